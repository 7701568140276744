"""The run folder's files: rows that survive any text and any kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vaopd.config import parse_config
from vaopd.errors import CheckpointError
from vaopd.train.folder import LARGEST_SIDE, RunFolder, read_rows

# Line ends that are none in JSON: str.splitlines() would split at each of them.
SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\ri"


RECIPE = parse_config({"run": "here", "student": "a", "teacher": "b", "data": {"train": "train.jsonl"}})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.start(RECIPE.to_yaml())
    return folder


def test_a_new_run_needs_an_empty_folder_and_a_resumed_one_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check(RECIPE, resume=False)
    with pytest.raises(CheckpointError, match=r"no run to resume in .*run"):
        folder.check(RECIPE, resume=True)
    folder.start(RECIPE.to_yaml())
    folder.check(RECIPE, resume=True)
    with pytest.raises(CheckpointError, match="--resume"):
        folder.check(RECIPE, resume=False)
    assert (folder.path / "config.yaml").read_text() == RECIPE.to_yaml()


def test_rows_read_back(folder: RunFolder) -> None:
    rows = [{"kind": "train", "step": step, "text": SEPARATORS, "n": {"x": [1.5, None, True]}} for step in range(3)]
    for row in rows:
        folder.append(folder.metrics, row)
    assert read_rows(folder.metrics) == rows
    assert read_rows(folder.metrics, lambda row: row["step"] == 1) == rows[1:2]
    assert read_rows(folder.path / "nothing.jsonl") == []


def test_numbers_that_are_not_finite_become_null(folder: RunFolder) -> None:
    folder.append(folder.metrics, {"step": 1, "loss": math.nan, "list": [math.inf, (1, -math.inf)], "in": {"x": math.nan}})
    assert read_rows(folder.metrics) == [{"step": 1, "loss": None, "list": [None, [1, None]], "in": {"x": None}}]
    folder.write_json("eval.json", {"se": math.nan})
    assert json.loads((folder.path / "eval.json").read_text()) == {"se": None}


def test_rewinding_drops_what_comes_after(folder: RunFolder) -> None:
    for file in (folder.metrics, folder.samples):
        for step in (0, 1, 2, 2, 3):
            folder.append(file, {"step": step, "text": SEPARATORS})
    before = folder.metrics.read_text(encoding="utf-8").split("\n")
    folder.rewind(2)
    for file in (folder.metrics, folder.samples):
        assert file.read_text(encoding="utf-8").split("\n") == [*before[:4], ""], "kept rows are the same bytes"
    folder.rewind(-1)
    assert folder.metrics.read_text() == ""


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_torn_last_row_is_forgotten(folder: RunFolder, cut: int) -> None:
    """Also in the middle of a character: 'é' and '…' are two and three bytes."""
    folder.append(folder.metrics, {"step": 1, "text": "whole"})
    whole = folder.metrics.read_bytes()
    folder.append(folder.metrics, {"step": 1, "t": "é…"})
    torn = folder.metrics.read_bytes()[: len(whole) + cut]
    if torn.endswith(b"}"):
        pytest.skip("whole but for its line end")
    folder.metrics.write_bytes(torn)
    assert [row.get("text") for row in read_rows(folder.metrics)] == ["whole"]
    folder.rewind(5)
    assert folder.metrics.read_bytes() == whole


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.floats(), st.integers(), st.none(), st.lists(st.text()))))
def test_any_text_stays_one_row(tmp_path_factory: pytest.TempPathFactory, row: dict[str, object]) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.append(folder.metrics, {**row, "step": 1})
    folder.append(folder.metrics, {"step": 2})
    rows = read_rows(folder.metrics)
    assert [r["step"] for r in rows] == [1, 2]
    folder.rewind(1)
    assert read_rows(folder.metrics) == rows[:1]


def test_a_picture_is_stored_once_under_its_content(folder: RunFolder) -> None:
    image = Image.effect_noise((600, 300), 50).convert("RGB")
    name = folder.picture(image)
    assert folder.picture(image.copy()) == name
    assert folder.picture(image.transpose(Image.Transpose.ROTATE_180)) != name
    assert len(list((folder.path / "samples").iterdir())) == 2
    assert Image.open(folder.path / name).size == (LARGEST_SIDE, LARGEST_SIDE // 2)
    assert image.size == (600, 300)


def test_a_run_is_resumed_with_its_own_recipe_only(tmp_path: Path) -> None:
    values = {"run": str(tmp_path), "student": "a", "teacher": "b", "data": {"train": "train.jsonl"}}
    folder, config = RunFolder(tmp_path), parse_config(values)
    folder.start(config.to_yaml())
    folder.check(config, resume=True)
    folder.check(parse_config(values | {"rollouts": {"rows": 7}, "run": "elsewhere", "checkpoint": {"keep": 3}}), resume=True)
    with pytest.raises(CheckpointError, match=r"optim\.lr was 1e-06, is 0\.01; seed was 0, is 1"):
        folder.check(parse_config(values | {"optim": {"lr": 0.01}, "seed": 1}), resume=True)
