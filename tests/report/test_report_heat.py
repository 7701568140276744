"""The colour scale, tokens as spans, foreign text made harmless, and the standalone picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from vaopd.errors import DataError
from vaopd.report import write_heat_map
from vaopd.report.heat import (
    LEVELS,
    Token,
    contrast,
    level,
    luminance,
    mean,
    nice_cap,
    read_tokens,
    readable,
    shades,
    spans,
    ticks,
    token_text,
    visible,
    wrap,
)  # fmt: skip
from vaopd.report.pictures import embed


@pytest.mark.parametrize("scale", ["va", "kl"])
@pytest.mark.parametrize(("theme", "sign"), [("light", -1), ("dark", 1)])
def test_more_advantage_is_strictly_further_from_the_page_and_always_readable(scale: str, theme: str, sign: int) -> None:
    colours = shades(scale, theme)
    brightness = [sign * luminance(c) for c in colours]
    assert len(colours) == LEVELS + 1
    assert brightness == sorted(set(brightness))
    assert min(contrast(c, readable(c)) for c in colours) >= 4.5


def test_level_is_monotone_in_nats_and_saturates_at_the_cap() -> None:
    levels = [level(i / 100, 4.0) for i in range(600)]
    assert levels == sorted(levels)
    assert set(levels) == set(range(LEVELS + 1))
    assert level(4.0, 4.0) == level(99.0, 4.0) == LEVELS
    assert level(None, 4.0) == level(0.0, 4.0) == level(-1.0, 4.0) == 0
    assert level(1.0, 4.0) == LEVELS // 2  # the square root: a quarter of the cap is half the scale


def test_the_legend_names_the_value_of_its_shades() -> None:
    assert ticks(4.0) == [(0, "0"), (3, "0.25"), (6, "1"), (9, "2.2"), (12, "≥ 4")]
    assert all(level(4.0 * (i / LEVELS) ** 2, 4.0) == i for i, _ in ticks(4.0))


@pytest.mark.parametrize(
    ("values", "cap"), [([], 1.0), ([0.0], 1.0), ([0.01], 0.5), ([5.2] * 100, 6.0), ([1.0] * 99 + [50.0], 1.0), ([0.7], 0.8)]
)
def test_the_cap_is_round_and_ignores_the_largest_two_percent(values: list[float], cap: float) -> None:
    assert nice_cap(values) == pytest.approx(cap)


def test_scores_are_probabilities_and_coefficients_in_uniform_weights() -> None:
    rollout = {
        "tokens": ["a", "b"],
        "va": [0.0, 1.5],
        "kl": [0.1, None],
        "coefficient": [0.05, 0.2],
        "logp_teacher": [0.0, -0.6931471805599453],
    }
    tokens = read_tokens(rollout, siblings=4)
    assert tokens[1].teacher == pytest.approx(0.5)
    assert tokens[1].times == pytest.approx(0.2 * 4 * 2)
    assert tokens[1].student is None
    assert tokens[1].scores == "VA 1.5 · KL – · teacher 0.5 → – · student – · coefficient 0.2 = 1.6 × uniform"


def test_short_lists_and_nulls_leave_gaps_but_every_token_is_shown() -> None:
    tokens = read_tokens({"tokens": ["a", "b", "c"], "va": [1.0], "kl": None, "logp_student": [float("nan"), True, "x"]}, 1)
    assert [t.va for t in tokens] == [1.0, None, None]
    assert [t.student for t in tokens] == [None, None, None]
    assert spans(tokens, 1.0, 1.0).count("<span ") == 3


def test_token_text_is_escaped_in_spans() -> None:
    page = spans([Token("<img src=x onerror=alert(1)>", 1.0, *[None] * 6), Token("\"&'</span>", None, *[None] * 6)], 1.0, 1.0)
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("</span>") == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [("abc é 中", "abc é 中"), ("a\u202eb", "a⟨U+202E⟩b"), ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"), ("\x00\x1b[31m", "⟨U+0000⟩⟨U+001B⟩[31m"),
     ("\ud800", "⟨U+D800⟩"), ("\U000e0041", "⟨U+E0041⟩"), ("\u200b", "⟨U+200B⟩"), ("\u200d", "\u200d"), ("a\nb\t", "a\nb\t")],
)  # fmt: skip
def test_what_is_invisible_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode()


def test_newlines_stay_and_are_marked_and_long_tokens_say_what_is_cut() -> None:
    assert token_text(".\n") == ".↵\n"
    assert token_text("") == "∅"
    assert token_text("x" * 5000) == "x" * 80 + "… (+4,920 characters)"


def test_wrap_never_passes_the_last_column() -> None:
    places = wrap(["aaaa", "bbbb", "cc", "d\n", "e", "中中", "x" * 99], 10)
    assert places[:5] == [(0, 0, 4), (0, 4, 4), (0, 8, 2), (1, 0, 1), (2, 0, 1)]
    assert all(at + width <= 10 for _, at, width in places)
    assert places[5] == (2, 1, 4)


def test_mean_skips_what_is_not_there() -> None:
    assert mean([1.0, None, 3.0]) == 2.0
    assert mean([None]) is None


def test_standalone_picture_is_well_formed_and_needs_nothing_else(run_folder: Path, tmp_path: Path) -> None:
    svg = write_heat_map(run_folder, tmp_path / "heat.svg", question="q1", rollout=1).read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    row = [json.loads(line) for line in (run_folder / "samples.jsonl").open()][-2]
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    rects = names.count("rect") - 1 - (LEVELS + 1)  # without the card and the legend
    assert row["id"] == "q1"
    assert rects == len(row["rollouts"][1]["tokens"])
    assert names.count("image") == 2
    assert "script" not in names
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_standalone_picture_of_hostile_text_is_still_well_formed(new_run: Callable[..., Path], tmp_path: Path) -> None:
    run = new_run()
    row = {
        "step": 1,
        "id": "x",
        "problem": "</svg><script>1</script>\x00",
        "rollouts": [{"tokens": ["</text><script>", "\ud800", "\x01" * 200]}],
    }
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    root = ElementTree.fromstring(write_heat_map(run, tmp_path / "heat.svg").read_text(encoding="utf-8"))
    assert not [e for e in root.iter() if e.tag.endswith("script")]


def test_standalone_picture_of_an_unknown_question_is_an_error(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'q99'"):
        write_heat_map(run_folder, tmp_path / "heat.svg", question="q99")


def test_only_pictures_inside_the_folder_are_embedded(run_folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes((run_folder / "samples/q0.png").read_bytes())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/link.png").symlink_to(secret)
    (tmp_path / "run/text.png").write_text("not an image")
    for name in ("../secret.png", str(secret), "link.png", "text.png", "absent.png", "", "\0", None, 3, ["x"]):
        assert embed(tmp_path / "run", name) is None
    picture = embed(run_folder, "samples/q0.png")
    assert picture is not None
    assert picture.uri.startswith("data:image/png;base64,")
    assert picture.small
