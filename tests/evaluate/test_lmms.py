"""`vaopd lmms-eval`: what is run and what isn't, what is refused before anything runs, and the result. Real runs: tests/lmms."""

import json
from dataclasses import replace

import pytest

from vaopd import cli
from vaopd.errors import CheckpointError, ConfigError, EvaluationError, ModelError
from vaopd.evaluate import lmms
from vaopd.evaluate.lmms import check_drawn, check_judged, evaluate_benchmarks, groups, identity
from vaopd.evaluate.lmms_benchmarks import BENCHMARKS, Part
from vaopd.evaluate.lmms_run import FINISHED, Result
from vaopd.files import claimed

FOUND = {"lmms-eval": "0.7.3", "vaopd": "0.1.0"}
AI2D = BENCHMARKS["ai2d"]


def result(*right, answers="x", truncated=0.0):
    units = {str(i): (float(r), str(i)) for i, r in enumerate(right)}
    return Result([Part(1.0, units)], len(right), 100 * sum(right) / len(right), answers, 5.0, truncated, 0)


@pytest.fixture
def runs(monkeypatch):
    """In the place of lmms-eval: sample j has its first j questions of four right. Names what was run."""
    ran = []

    def run(*, folder, benchmark, settings, number, **_):
        ran.append((benchmark.name, number, settings))
        made = result(*[i < number for i in range(4)], answers=f"{benchmark.name} {number}", truncated=0.5)
        folder.mkdir(parents=True)
        entry = {"settings": settings.__dict__, **made.__dict__, "parts": [part.__dict__ for part in made.parts]}
        (folder / FINISHED).write_text(json.dumps(entry))
        return made

    monkeypatch.setattr(lmms, "run", run)
    monkeypatch.setattr(lmms, "versions", lambda python: FOUND)
    monkeypatch.setenv(lmms.PYTHON_VARIABLE, "/env/bin/python")
    return ran


@pytest.mark.parametrize(
    "secret", ["api_key=sk-hidden", "base_url=http://h/v1, API_KEY=sk-hidden", "base_url=http://me:sk-hidden@h/v1", "token=sk-hidden"]
)
def test_a_secret_would_stand_in_every_result(runs, tmp_path, secret):
    with pytest.raises(ConfigError, match="has a secret") as error:
        evaluate_benchmarks("m", ["ai2d"], tmp_path, k=1, backend="openai", model_args=secret)
    assert "sk-hidden" not in str(error.value)
    assert runs == []
    evaluate_benchmarks("m", ["ai2d"], tmp_path, k=1, backend="openai", model_args="base_url=http://h/v1,eos_token=x,max_tokens=3")


def test_a_file_in_the_place_of_the_folder_is_said_before_anything_runs(runs, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*out can't be a folder \(File exists\)"):
        evaluate_benchmarks("builtin:student", ["ai2d"], tmp_path / "out", k=1)
    assert runs == []


def test_a_folder_takes_one_evaluation_at_a_time(runs, tmp_path):
    with claimed(tmp_path, "--out FOLDER"), pytest.raises(CheckpointError, match=r"another process is writing .* --out FOLDER"):
        evaluate_benchmarks("builtin:student", ["ai2d"], tmp_path, k=1)
    assert runs == []


def test_only_the_samples_that_are_missing_are_run(runs, tmp_path):
    first = evaluate_benchmarks("builtin:student", ["ai2d"], tmp_path, k=2)
    assert [(name, number) for name, number, _ in runs] == [("ai2d", 1), ("ai2d", 2)]
    runs.clear()
    said = []
    again = evaluate_benchmarks("builtin:student", ["ai2d", "mmstar=average"], tmp_path, k=3, say=said.append)
    assert [(name, number) for name, number, _ in runs] == [("ai2d", 3), ("mmstar", 1), ("mmstar", 2), ("mmstar", 3)]
    assert "2 of 6 samples are there already" in said
    assert any("50 % of the responses were cut at 4096 tokens" in text for text in said)
    assert first["benchmarks"]["ai2d"]["samples"] == [25, 50]
    entry = again["benchmarks"]["ai2d"]
    assert entry["samples"] == [25, 50, 75]
    assert entry["mean"] == pytest.approx(50)
    assert entry["n"] == 4
    # per question 1, 2/3, 1/3, 0: std with ddof 1 over the root of 4
    assert entry["se"] == pytest.approx(100 * ((1 / 4 + 1 / 36) * 2 / 3) ** 0.5 / 2)
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == again


def test_samples_that_repeat_one_another_are_no_avg_at_k():
    drawn, other = result(1, 0, answers="a"), result(1, 0, answers="b")
    assert check_drawn(AI2D, [drawn, other], None) is None
    with pytest.raises(EvaluationError, match=r"sample 3 has the answers of sample 1, word for word\. The backend doesn't draw"):
        check_drawn(AI2D, [drawn, other, drawn], None)
    assert "with 5 questions that can be chance" in check_drawn(AI2D, [drawn, drawn], 5)


def test_a_judge_that_was_never_asked_is_said():
    verse, drawn = BENCHMARKS["mathverse"], result(1, 0, answers="a")
    assert drawn.judged == 0
    assert check_judged(AI2D, [drawn]) is None
    assert check_judged(verse, [drawn, replace(drawn, judged=2)]) is None
    assert "mathverse: the judge was asked about none of the 2 answers of sample 1" in check_judged(verse, [drawn])


def test_the_papers_two_means():
    """The row 'VA-OPD' of the paper's table: 48.3 and 66.1."""
    means = dict(zip(BENCHMARKS, (46.6, 66.4, 31.9, 54.5, 78.2, 51.5, 59.9, 86.4), strict=True))
    entries = {name: {"mean": mean, "se": 1.0} for name, mean in means.items()}
    found = groups(entries)
    assert {name: round(group["mean"], 1) for name, group in found.items()} == {"math": 48.3, "visual": 66.1}
    assert found["math"]["se"] == pytest.approx(3**0.5 / 3)
    del entries["ai2d"]
    assert list(groups(entries)) == ["math"]


@pytest.fixture
def vaopd(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["vaopd", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        printed = capsys.readouterr()
        return done.value.code, printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "mathvista, mathverse: graded by a judge, and none was given"),
        (["--tasks", "ai2"], 2, "Did you mean 'ai2d'?"),
        (["--tasks", "ai2d,ai2d=exact_match"], 2, "'ai2d' is in --tasks twice"),
        (["--tasks", "../ai2d=exact_match"], 2, "TASK=METRIC"),
        (["--tasks", "ai2d", "--judge-model", "m"], 2, "needs both --judge-url and --judge-model"),
        (["--tasks", "ai2d", "--judge-url", "localhost:8000", "--judge-model", "m"], 2, "is no http(s) address"),
    ],
)
def test_mistakes_are_told_before_anything_runs(vaopd, runs, tmp_path, arguments, code, says):
    got, _, err = vaopd("lmms-eval", "builtin:student", "--out", tmp_path / "out", *arguments)
    assert (got, runs) == (code, [])
    assert says in err
    assert not (tmp_path / "out").exists()


def test_the_environment_has_to_be_named_and_to_have_both_packages(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(lmms, "versions", lambda python: {"lmms-eval": "0.7.3"})
    with pytest.raises(ConfigError, match="has no vaopd"):
        evaluate_benchmarks("builtin:student", ["ai2d"], tmp_path)
    monkeypatch.delenv(lmms.PYTHON_VARIABLE)
    with pytest.raises(ConfigError, match=r"environment of its own.*--lmms-python"):
        evaluate_benchmarks("builtin:student", ["ai2d"], tmp_path)


def test_what_a_reader_has_to_know_is_said(vaopd, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(lmms, "versions", lambda python: FOUND | {"lmms-eval": "0.8.0"})
    arguments = ("--tasks", "hallusionbench", "--k", 1, "--limit", 9, "--backend", "vllm")
    code, out, err = vaopd("lmms-eval", "hub/name", "--out", tmp_path, *arguments)
    assert code == 0, err
    for text in (
        "lmms-eval is 0.8.0; the table of benchmarks is of 0.7.3",
        "hallusionbench: no judge was given, so it is graded by rule",
        "only the first 9 questions of each",
        "--backend vllm samples as lmms-eval has it",
        "avg@1",
        "25.0 ±",
    ):
        assert " ".join(text.split()) in " ".join(out.split())


def test_a_model_is_known_by_its_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    path, before = identity(str(folder), "vaopd")
    assert path == str(folder)
    (folder / "model.safetensors").write_bytes(b"2")
    assert identity(str(folder), "vaopd")[1] != before
    assert identity("Qwen/Qwen3-VL-2B-Instruct", "vaopd") == ("Qwen/Qwen3-VL-2B-Instruct", None)
    (tmp_path / "a,b").mkdir()
    with pytest.raises(ModelError, match="separates its arguments by commas"):
        identity(str(tmp_path / "a,b"), "vaopd")
