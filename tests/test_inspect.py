"""`vaopd inspect` and `vaopd probe` as a person runs them: what is printed, what is written, and mistakes."""

import json
import re
import sys

import pytest
from PIL import Image

from vaopd.cli import main
from vaopd.config import WorldConfig
from vaopd.world.data import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(WorldConfig(train=1, eval=2, test=3, seed=3), folder)
    return folder


@pytest.fixture
def image(world):
    return sorted((world / "images").iterdir())[0]


@pytest.fixture
def vaopd(monkeypatch, capsys):
    """Runs a command in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vaopd", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


QUESTION = "What is the perimeter of this triangle?"


def test_an_answer_in_the_terminal_and_as_a_page(vaopd, image, tmp_path):
    out = tmp_path / "pages" / "answer.html"
    code, text, err = vaopd("inspect", "--teacher", "builtin:teacher", "--image", image, "--question", QUESTION, "--out", out)
    assert code == 0, err
    assert QUESTION in text
    assert "answered by builtin:teacher, scored by builtin:teacher" in text
    assert "visual advantage, nats:  0 " in text
    strongest = re.search(r"most visual: '([^']+)' (\d+\.\d\d)", text)
    assert float(strongest[2]) > 0.3  # the labels that had to be read
    page = out.read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert len(re.findall(r'<span class="v\d+ k\d+" title="VA [^"]*">', page)) > 8
    assert f"<code>{strongest[1]}</code>" in page
    assert "mean KL" not in page  # a model is not compared with itself


def test_a_student_is_compared_with_its_teacher(vaopd, image, tmp_path):
    arguments = ("--teacher", "builtin:teacher", "--student", "builtin:student", "--image", image, "--question", QUESTION)
    code, text, err = vaopd("inspect", *arguments, "--out", tmp_path / "a.html", "--view", "black")
    assert code == 0, err
    assert "answered by builtin:student, scored by builtin:teacher" in text
    assert "mean KL" in (tmp_path / "a.html").read_text()
    again = vaopd("inspect", *arguments, "--view", "black")[1]
    assert again == text[: len(again)]
    assert vaopd("inspect", *arguments, "--view", "pixelate")[1] != again


def test_several_pictures(vaopd, world, tmp_path):
    first, second = sorted((world / "images").iterdir())[:2]
    question = "<image> or <image>: how long is the longest side?"
    out = tmp_path / "a.html"
    code, _, err = vaopd(
        "inspect", "--teacher", "builtin:teacher", "--image", first, "--image", second, "--question", question, "--out", out
    )
    assert code == 0, err
    assert out.read_text().count('src="data:image/png;base64,') == 4
    code, _, err = vaopd("inspect", "--teacher", "builtin:teacher", "--image", first, "--question", question)
    assert code == 3
    assert "2" in err


def test_a_hostile_question_stays_text(vaopd, image, tmp_path):
    hostile = "</p><script>planted</script> [bold]x[/] \u202e\x1b[31m <|im_end|> {{ 7*7 }} What is the perimeter?"
    out = tmp_path / "a.html"
    code, text, err = vaopd("inspect", "--teacher", "builtin:teacher", "--image", image, "--question", hostile, "--out", out)
    assert code == 0, err
    page = out.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;planted&lt;/script&gt;" in page
    assert "49" not in page.split("<main>")[1].split("problem")[1].split("</p>")[0]
    assert "\u202e" not in page + text
    assert "\x1b" not in page + text
    assert "[bold]x[/]" in text
    assert "⟨U+202E⟩" in text


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"--image": "nowhere.png"}, 3, "nowhere.png"),
        ({"--image": __file__}, 3, "no JPEG, PNG or WebP"),
        ({"--teacher": "builtin:techer"}, 4, "Did you mean 'teacher'?"),
        ({"--student": "no/such/folder"}, 4, "no model folder"),
        ({"--view": "blr"}, 2, "Did you mean 'blur'?"),
        ({"--view-set": "rato=0.2"}, 2, "Did you mean 'ratio'?"),
        ({"--view-set": "ratio=2"}, 2, "at most 1"),
        ({"--question": "<image> "}, 3, "the question is empty"),
    ],
)
def test_mistakes(vaopd, image, change, code, says):
    values = {"--teacher": "builtin:teacher", "--image": image, "--question": QUESTION} | change
    got, _, err = vaopd("inspect", *(part for pair in values.items() for part in pair))
    assert got == code
    assert says in err.replace("\n", " ")


def test_without_a_picture_there_is_nothing_to_inspect(vaopd):
    code, _, err = vaopd("inspect", "--teacher", "builtin:teacher", "--question", QUESTION)
    assert code == 2
    assert "--image" in err


def test_a_large_picture_is_shown_small(vaopd, tmp_path):
    Image.effect_noise((900, 600), 80).convert("RGB").save(tmp_path / "large.png")
    out = tmp_path / "a.html"
    arguments = ("--teacher", "builtin:teacher", "--image", tmp_path / "large.png", "--question", QUESTION, "--out", out)
    code, _, err = vaopd("inspect", *arguments, "--max-tokens", 4)
    assert code == 0, err
    assert out.stat().st_size < 1_500_000
    assert "cut at the limit" in out.read_text()


def test_probe_prints_what_it_writes(vaopd, world, tmp_path):
    out = tmp_path / "probes" / "out.json"
    arguments = ("--teacher", "builtin:teacher", "--data", world / "test.jsonl", "--k", 2, "--max-tokens", 48, "--out", out)
    code, text, err = vaopd("probe", "builtin:student", *arguments, "--views", "black", "--views", "grey", "--other", "builtin:teacher")
    assert code == 0, err
    result = json.loads(out.read_text())
    assert result["questions"] == 3
    assert list(result["views"]) == ["black", "grey"]
    for value in (result["visual"]["kl"], result["masking"]["top"]["va"], result["views"]["black"]["va_top10"]):
        assert f"{100 * value:.1f}" in text
    for value in (result["entropy"]["all"], result["fixed_responses"]["builtin:student"]["visual"], result["views"]["grey"]["va"]):
        assert f"{value:.3f}" in text


def test_evaluate_takes_a_view(vaopd, world, tmp_path):
    arguments = ("evaluate", "builtin:student", "--data", world / "test.jsonl", "--k", 1, "--max-tokens", 48)
    code, _, err = vaopd(*arguments, "--view", "crop", "--view-set", "share=0.3")
    assert code == 0, err
    code, _, err = vaopd(*arguments, "--view", "crop", "--view-set", "shar=0.3")
    assert code == 2
    assert "Did you mean 'share'?" in err
