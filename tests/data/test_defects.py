"""`vaopd validate` finds every defect that is known, each with its row, field, reason and fix, in one pass and without a traceback."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defects import BAD_SETS, DEFECTS, GOOD, LEGAL, BadSet, write_defects
from PIL import Image
from small_processor import encoded, noise
from typer.testing import CliRunner

from small_pair import Pair
from vaopd.cli import app, main
from vaopd.config import RunConfig
from vaopd.data.images import content_hash, decode
from vaopd.data.render import Renderer
from vaopd.data.survey import survey
from vaopd.errors import DataError
from vaopd.models.load import open_source
from vaopd.train.setup import open_models, row_check, set_up
from vaopd.types import DEGRADED, ORIGINAL, Example
from vaopd.views import view

Validate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def validate(
    recipe: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Validate:
    """`vaopd validate` on a data section, as its program runs: exit code, stdout, stderr."""

    def run(data: dict[str, Any]) -> tuple[int, str, str]:
        config = recipe(data={"eval": None, **data})
        (tmp_path / "recipe.yaml").write_text(config.to_yaml())
        monkeypatch.setattr(sys, "argv", ["vaopd", "validate", str(tmp_path / "recipe.yaml")])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        assert not config.run.exists()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_every_defect_is_found_with_row_field_reason_and_fix(validate: Validate, tmp_path: Path) -> None:
    assert len(DEFECTS) >= 30
    (tmp_path / "set").mkdir()
    path = write_defects(tmp_path / "set")
    code, _, said = validate({"train": str(path)})
    assert code == 1
    assert f"data.train: {len(DEFECTS)} of {len(DEFECTS) + 1} rows can't be used" in said
    told = [line for line in said.splitlines() if line.startswith("  - ")]
    missed = []
    for number, defect in enumerate(DEFECTS, 2):
        where = f"  - {path}, line {number}"
        [message] = [line for line in told if line.startswith((f"{where},", f"{where}:"))] or [""]
        wanted = (defect.field, defect.reason, defect.fix)
        if not message or not all(part in message for part in wanted) or len(message) > 800:
            missed.append((defect.name, wanted, message))
    assert not missed
    assert "\x1b" not in said


@pytest.mark.parametrize("bad", BAD_SETS, ids=lambda bad: bad.name)
def test_a_set_that_cannot_be_used_as_a_whole(validate: Validate, tmp_path: Path, bad: BadSet) -> None:
    (tmp_path / "set").mkdir()
    code, _, said = validate(bad.make(tmp_path / "set"))
    assert code == 1
    assert all(part in said for part in bad.says), said


def test_the_same_defects_stop_a_run_before_its_weights_are_loaded(
    recipe: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that only the processor and the models' length tell: a run must not find them after hours."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("vaopd.models.load.AutoModelForImageTextToText.from_pretrained", refuse)
    for name in ("wide", "too long", "truncated png", "misspelt field"):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        (folder / "good.png").write_bytes(encoded(noise()))
        [defect] = [defect for defect in DEFECTS if defect.name == name]
        for file, content in defect.files.items():
            (folder / file).write_bytes(content)
        (folder / "train.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + defect.line())
        with pytest.raises(DataError, match=rf"train.jsonl, line 2.*{defect.field}"):
            set_up(recipe(data={"train": str(folder / "train.jsonl"), "eval": None}), on_check=lambda text: None)


def test_what_is_skipped_and_used_adds_up(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Rows in = rows trained on + rows skipped by reason; nothing is skipped unless the recipe says so."""
    (tmp_path / "set").mkdir()
    path, told = write_defects(tmp_path / "set"), list[str]()
    run = set_up(recipe(data={"train": str(path), "eval": None, "bad_rows": "skip"}), on_check=told.append)
    assert [example.id for example in run.train] == ["good"]
    skipped = [note for note in told if "rows skipped: " in note]
    assert sum(int(note.removeprefix("data.train: ").split()[0]) for note in skipped) == len(DEFECTS)
    assert f"1 train · 0 held out · 0 test · {len(DEFECTS)} skipped · no test question trained on" in told
    file = run.account["files"]["train"]
    assert file["rows"] == len(DEFECTS) + 1 == file["used"] + sum(file["skipped"].values())
    assert (file["used"], run.account["train"]) == (1, 1)


def test_a_run_says_at_its_end_what_it_skipped(recipe: Callable[..., RunConfig], data: dict[str, str], tmp_path: Path) -> None:
    """In the summary, in data.json and in the model's card; with a share held out, every row is on one side or told of."""
    rows = [json.loads(line) for line in Path(data["train"]).read_text().splitlines()]
    bad = Path(data["train"]).with_name("with_bad_rows.jsonl")
    bad.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"problem": 3}, {"problem": 4}, {"problem": "x?", "images": ["no.png"]}])
    )
    config = recipe(data={"train": str(bad), "eval": None, "holdout": 0.4, "bad_rows": "skip"}, optim={"steps": 1})
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--no-report"])
    assert done.exit_code == 0, done.output
    summary = done.output[done.output.index("data.train: 2 of 9 rows skipped: field 'problem': must be text") :]
    assert "data.train: 1 of 9 rows skipped: field 'images', image N: '…' does not exist" in summary
    account = json.loads((config.run / "data.json").read_text())
    assert account["files"]["train"]["used"] == account["train"] + account["held_out"] + account["left_out"] == 6
    assert account["held_out"] > 0
    assert "(3 more could not be used)" in (config.run / "model/README.md").read_text()


# --- odd and right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_odd_and_legal_is_shown_right_and_alike(validate: Validate, pair: Pair, tmp_path: Path, name: str) -> None:
    """The picture that is meant, and the same pixels for student and teacher, in both views."""
    data, meant, difference = LEGAL[name]
    (tmp_path / "picture.png").write_bytes(data)
    (tmp_path / "train.jsonl").write_text(json.dumps({"images": ["picture.png"], "problem": "What?"}) + "\n")
    code, said, wrong = validate({"train": str(tmp_path / "train.jsonl")})
    assert (code, wrong) == (0, "")
    assert "1 train · 0 held out · 0 test · 0 skipped" in said
    assert ("1 rows with a picture of a single colour" in said) == (name in ("1x1", "cmyk"))
    shown = decode(tmp_path / "picture.png")
    assert shown.size == meant.size
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(meant)).max() <= difference
    if difference == 0:
        assert content_hash(shown) == content_hash(meant)
    example = Example("row", (tmp_path / "picture.png",), "What?")
    student, teacher = (
        Renderer(open_source(str(folder)).processor, view("pixelate"))(example) for folder in (pair.student_folder, pair.teacher_folder)
    )
    for which in (ORIGINAL, DEGRADED):
        pixels = [prompt.images[which]["pixel_values"].numpy().tobytes() for prompt in (student, teacher)]
        assert pixels[0] == pixels[1]


def test_a_repeated_question_is_mentioned(validate: Validate, tmp_path: Path) -> None:
    rows = [{"problem": "1 + 1?"}, {"problem": "2 + 2?"}, {"problem": "1 + 1?"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said, _ = validate({"train": str(tmp_path / "train.jsonl")})
    assert code == 0
    assert (
        f"data.train: 1 rows that ask an earlier row's question about the same pixels; the first: {tmp_path / 'train.jsonl'}, line 3"
        in said
    )


# --- how fast -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_photographs_a_second(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Of a megapixel, as JPEG, with every check that `vaopd validate` makes of a row; and little more than decoding and hashing alone.

    In one core's time, since others may use the machine, and the best of three turns. The second bound is the same on any processor.
    """
    photo = noise(96, 96).resize((1152, 864))
    (tmp_path / "photo.jpg").write_bytes(encoded(photo, "JPEG", quality=90))
    rows = [{"images": ["photo.jpg"], "problem": f"What is at place {number}?"} for number in range(256)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe()
    source, teacher = open_models(config, lambda text: None)
    assert teacher is not None
    check = row_check(config, (source, teacher), Renderer(source.processor))
    pixels = photo.tobytes()

    def least(_: object) -> None:
        Image.open(tmp_path / "photo.jpg").load()
        hashlib.sha256(pixels).digest()

    def unavoidable() -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # as `survey` does: threads slow one another
            list(pool.map(least, rows))

    def seconds(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    turns = [(seconds(unavoidable), seconds(lambda: survey(path, check=check))) for _ in range(3)]
    least_time, checked = (min(times) for times in zip(*turns, strict=True))
    speed = len(rows) / checked
    print(f"{speed:.0f} photographs a second of one core, {checked / least_time:.2f} of the least")
    assert speed >= 50
    assert checked <= 1.8 * least_time
    found = survey(path, check=check)
    assert found.pictures == 256
    assert len(found.tokens) == 256
