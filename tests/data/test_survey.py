"""What a look at every row finds, and how a set is split without a question on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_processor import encoded, noise

from vaopd.config import DataConfig
from vaopd.data.survey import reason_of, survey
from vaopd.data.validate import is_held_out, open_sets
from vaopd.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"q{n}", "problem": f"What is {n} + {n}?", "answer": str(2 * n), **more} for n in range(count)]


def test_every_row_is_counted(figure: Path) -> None:
    folder = figure.parent
    (folder / "torn.png").write_bytes(encoded(noise())[:100])
    rows = [
        {"id": "a", "images": ["figure.png", "figure.png"], "problem": "x?"},
        {"id": "b", "images": ["torn.png"], "problem": "x?"},
        {"id": "c", "images": ["gone.png"], "problem": "x?"},
        {"id": "d", "images": ["gone2.png"], "problem": "x?"},
        {"id": "a", "problem": "x?"},
        {"id": "e", "problem": "x?", "answer": "3"},
    ]
    told: list[tuple[int, float]] = []
    found = survey(write(folder / "train.jsonl", rows), strict=False, on_progress=lambda done, share: told.append((done, share)))
    assert [example.id for example in found.rows] == ["a", "e"]
    assert (found.pictures, found.text_only, dict(found.without)) == (2, 1, {"answer": 1, "solution": 2})
    assert len(found.rows) + len(found.defects) == len(rows)
    assert sorted(found.defects.by_reason.values()) == [1, 1, 2]  # the two missing files have one reason
    assert max(found.defects.by_reason, key=found.defects.by_reason.__getitem__).startswith("field 'images', image N: '…' does not exist")
    assert all(part in str(error) for part, error in zip(("'b'", "line 3", "line 4", "line 5"), found.defects.first, strict=True))
    assert told[-1] == (6, 1.0)
    with pytest.raises(DataError, match=r"example 'b'.*damaged"):
        survey(folder / "train.jsonl")


def test_only_ten_bad_rows_are_told(tmp_path: Path) -> None:
    rows = [*numbered(1), *({"id": f"b{n}", "problem": n} for n in range(25))]
    found = survey(write(tmp_path / "train.jsonl", rows), strict=False)
    assert (len(found.defects), len(found.defects.first), len(found.defects.by_reason)) == (25, 10, 1)
    with pytest.raises(DataError, match=r"none of its 25 rows can be used. The first: .*line 1"):
        open_sets(DataConfig(train=write(tmp_path / "train.jsonl", rows[1:]), bad_rows="skip"))


def test_reasons_are_equal_for_rows_that_are_wrong_alike() -> None:
    one = reason_of(
        DataError("d.jsonl, line 3, field 'images', image 1: 'a.png' does not exist in '/x' or is no file. Check."), "d.jsonl, line 3"
    )
    two = reason_of(
        DataError("d.jsonl, line 9, field 'images', image 2: 'b 7.png' does not exist in '/x' or is no file. Check."), "d.jsonl, line 9"
    )
    assert one == two
    assert reason_of(DataError("d, row 2: invalid JSON. x"), "d, row 2") == "invalid JSON"
    assert reason_of(DataError("d, row 2: half of it at 5. Save it."), "d, row 2") == "half of it at N"
    assert reason_of(DataError("d, row 2: '../a' leads outside the file's folder, '/x y'. Copy it."), "d, row 2") == (
        "'…' leads outside the file's folder, '…'"
    )


# --- held out ---------------------------------------------------------------------------------------------------------


def test_the_held_out_rows_follow_from_their_ids_alone(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    sets = open_sets(DataConfig(train=write(path, numbered(400)), holdout=0.1))
    held = {example.id for example in sets.held_out}
    assert held == {f"q{n}" for n in range(400) if is_held_out(f"q{n}", 0.1)}
    assert 20 <= len(held) <= 60  # 40 are expected, 6 is the standard deviation
    assert [example.id for example in sets.train] == [f"q{n}" for n in range(400) if f"q{n}" not in held]
    assert list(sets.test) == list(sets.held_out)
    trained = {example.id for example in sets.train}
    more = open_sets(DataConfig(train=write(path, numbered(600)[::-1]), holdout=0.1))
    assert {example.id for example in more.held_out} >= held
    assert {example.id for example in more.train} >= trained
    assert all(is_held_out(id_, 0.2) for id_ in held)  # a larger share holds the smaller one


def test_no_copy_of_a_held_out_question_is_trained_on(figure: Path) -> None:
    folder = figure.parent
    (folder / "again.webp").write_bytes(encoded(noise(), "WEBP", lossless=True))
    rows = numbered(60, images=["figure.png"])
    held = next(n for n in range(60) if is_held_out(f"q{n}", 0.1))
    free = next(f"copy{n}" for n in range(100) if not is_held_out(f"copy{n}", 0.1))
    copy = {**rows[held], "id": free, "images": ["again.webp"]}  # another id, another file, the same pixels and words
    sets = open_sets(DataConfig(train=write(folder / "train.jsonl", [*rows, copy]), holdout=0.1))
    assert free not in {example.id for example in sets.train}
    assert f"q{held}" in {example.id for example in sets.held_out}
    assert len(sets.train) + len(sets.held_out) + sets.left_out == 61
    assert sets.left_out == 1
    assert "1 training rows left out: they ask a held-out question with the same pictures" in sets.notes


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", numbered(3))
    with pytest.raises(DataError, match=r"leaves 3 to train on and 0 held out"):
        open_sets(DataConfig(train=path, holdout=0.001))


def test_a_test_question_is_never_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", numbered(60))
    trained = next(n for n in range(60) if not is_held_out(f"q{n}", 0.1))
    test = write(tmp_path / "test.jsonl", [{**numbered(60)[trained], "id": "t"}])
    with pytest.raises(DataError, match=rf"1 of 1 rows of data.test .*'t' \(trained as 'q{trained}'\)"):
        open_sets(DataConfig(train=path, test=test, holdout=0.1))
    held = next(n for n in range(60) if is_held_out(f"q{n}", 0.1))
    write(test, [{**numbered(60)[held], "id": "t"}])
    assert len(open_sets(DataConfig(train=path, test=test, holdout=0.1)).test) == 1


def test_bad_rows_are_skipped_only_where_the_recipe_says_so(figure: Path) -> None:
    rows = [*numbered(3), {"problem": "x?", "images": ["gone.png"]}, {"id": "p", "problem": "x?", "images": ["figure.png"]}]
    path = write(figure.parent / "train.jsonl", rows)
    with pytest.raises(DataError, match="line 4"):
        open_sets(DataConfig(train=path))
    notes = open_sets(DataConfig(train=path, bad_rows="skip")).notes
    assert notes[0].startswith("4 train · 0 held out · 0 test · 1 skipped")
    assert "data.train: 3 of 4 rows without a picture; their tokens weigh alike" in notes
    assert any(note.startswith("data.train: 1 rows skipped: field 'images'") for note in notes)


def test_turns_that_are_not_used_are_counted(tmp_path: Path) -> None:
    turns = [{"from": speaker, "value": "x"} for speaker in ("human", "gpt", "human", "gpt")]
    rows = [{"id": str(n), "conversations": turns[: 2 + 2 * (n % 2)]} for n in range(4)]
    path = write(tmp_path / "train.jsonl", rows)
    unread = "2 rows with further turns, of which only the first question and its reply are used"
    assert f"data.train: {unread}; the first: {path}, line 2" in open_sets(DataConfig(train=path)).notes
