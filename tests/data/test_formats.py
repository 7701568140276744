"""Published formats, brought into our own fields: each is written here in the schema in which it is published."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from small_processor import encoded, noise

from vaopd.data.formats import FORMATS, choose_format, from_llava, from_virl39k, last_boxed
from vaopd.data.images import content_hash, decode
from vaopd.data.sources import Reader, Rows, iterate_rows, read_examples
from vaopd.data.tables import CACHE, Parquet
from vaopd.errors import DataError
from vaopd.types import Example

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
VIRL39K = pyarrow.schema(
    [
        ("question", pyarrow.string()),
        ("answer", pyarrow.string()),
        ("PassRate_32BTrained", pyarrow.float64()),
        ("PassRate_7BBase", pyarrow.float64()),
        ("category", pyarrow.string()),
        ("source", pyarrow.string()),
        ("qid", pyarrow.string()),
        ("image", pyarrow.list_(pyarrow.string())),
    ]
)


def virl_row(**changes: Any) -> dict[str, Any]:
    row = {
        "question": "<image>Find $\\angle A$.",
        "answer": "\\boxed{17^\\circ}",
        "PassRate_32BTrained": 0.5,
        "PassRate_7BBase": -1.0,
        "category": "(GradeSchool) Geometric",
        "source": "Processed",
        "qid": "Processed-17",
        "image": ["images/Processed-17-0.png"],
    }
    return row | changes


def virl39k(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "images").mkdir()
    for n in range(2):
        (folder / "images" / f"Processed-17-{n}.png").write_bytes(encoded(noise(seed=n)))
    path = folder / "39Krelease.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=VIRL39K), path)
    return path


def llava(folder: Path, *rows: Any, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def talk(*texts: str) -> list[dict[str, str]]:
    return [turn(("human", "gpt")[n % 2], text) for n, text in enumerate(texts)]


# --- each of them -----------------------------------------------------------------------------------------------------


def test_geometry3k(tmp_path: Path) -> None:
    schema = pyarrow.schema([("images", pyarrow.list_(IMAGE)), ("problem", pyarrow.string()), ("answer", pyarrow.string())])
    rows = [{"images": [{"bytes": encoded(noise()), "path": None}], "problem": "<image>Find x.", "answer": "8 \\sqrt { 2 }"}]
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)
    (example,) = read_examples(path)
    assert (example.id, example.problem, example.answer, example.solution) == ("row-1", "<image>Find x.", "8 \\sqrt { 2 }", None)
    assert content_hash(decode(example.images[0])) == content_hash(noise())


def test_virl39k(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    second = virl_row(qid="b", question="Is <image> or <image> larger?", image=[f"images/Processed-17-{n}.png" for n in (0, 1)], answer="A")
    path = virl39k(tmp_path, virl_row(), second, virl_row(qid="c", question="2 + 2?", image=[]))
    with caplog.at_level(logging.WARNING):
        first, two, text = read_examples(path)
    picture = tmp_path / "images" / "Processed-17-0.png"
    assert first == Example("Processed-17", (picture,), "<image>Find $\\angle A$.", "17^\\circ", None)
    assert (two.images, two.answer) == ((picture, picture.with_name("Processed-17-1.png")), "A")
    assert text.images == ()
    assert "columns not used: PassRate_32BTrained, PassRate_7BBase, category, source" in caplog.text


def test_a_bad_row_of_virl39k_is_named_in_its_own_columns(tmp_path: Path) -> None:
    path = virl39k(tmp_path, virl_row(), virl_row(qid="b", image=["../secret.png"]))
    with pytest.raises(DataError, match=r"row 2, field 'images', image 1.*outside.*Read as virl39k: .*images is its image"):
        read_examples(path)


def test_llava(tmp_path: Path, figure: Path) -> None:
    long = {"id": "b", "image": "figure.png", "conversations": talk("<image>\nWhat is é?", "A box.", "And?", "Nothing.")}
    bare = {"id": 3, "conversations": talk("What is 2 + 2?"), "height": 7}
    path = llava(tmp_path, {"id": "a", "image": "figure.png", "conversations": talk("<image>\nWhat?", "It is a box.")}, long, bare)
    assert read_examples(path) == [
        Example("a", (figure,), "<image>\nWhat?", None, "It is a box."),  # a reply is a solution to learn from, no answer to grade by
        Example("b", (figure,), "<image>\nWhat is é?", None, "A box."),
        Example("3", (), "What is 2 + 2?"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "What?"}, "must be a list"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "must be a list of"),
        ({"conversations": []}, "it is nobody"),
        ({"conversations": [turn("gpt", "x")]}, "it is 'gpt'"),
        ({"conversations": [turn("system", "x"), turn("human", "y")]}, "it is 'system', 'human'"),
        ({"conversations": [turn("human", "x"), turn("human", "y")]}, "it is 'human', 'human'"),
    ],
)
def test_conversations_of_another_shape(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_llava(row)


def test_image_folder_with_metadata(tmp_path: Path, figure: Path) -> None:
    rows = [
        {"file_name": "figure.png", "problem": "What?", "answer": "3"},
        {"file_names": ["figure.png", "figure.png"], "problem": "Equal?", "label": 4},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_examples(tmp_path) == [Example("row-1", (figure,), "What?", "3"), Example("row-2", (figure, figure), "Equal?")]
    rows[0] |= {"image": "figure.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="both a file name and 'image'"):
        read_examples(tmp_path)


def test_image_folder_with_one_question(tmp_path: Path, figure: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "A.JPG").write_bytes(encoded(noise(), "JPEG"))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        examples = read_examples(tmp_path, question="Describe <image>.")
    assert examples == [
        Example("b/A.JPG", (tmp_path / "b" / "A.JPG",), "Describe <image>."),
        Example("figure.png", (figure,), "Describe <image>."),
    ]
    assert "2 files that are no pictures" in caplog.text
    with pytest.raises(DataError, match=r"pictures but no questions.*data\.question"):
        read_examples(tmp_path)
    (tmp_path / "evil.png").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="leads outside"):
        read_examples(tmp_path, question="x?")


def test_folders_that_say_where_their_metadata_is(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match="has its metadata in train"):
        read_examples(tmp_path, question="x?")
    (tmp_path / "metadata.csv").write_text("file_name\n")
    with pytest.raises(DataError, match=r"metadata\.csv, which isn't read"):
        read_examples(tmp_path)


# --- which of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["problem"], "plain"),
        (["problem", "question", "image"], "plain"),
        (["file_name", "problem"], "imagefolder"),
        (["qid", "question", "image", "answer"], "virl39k"),
        (["id", "image", "conversations"], "llava"),
        (["question", "image", "answer"], None),
        ([], None),
    ],
)
def test_columns_tell_the_format(columns: list[str], name: str | None) -> None:
    assert choose_format(columns) == (None if name is None else FORMATS[name])


def test_columns_that_tell_two_formats_need_a_word() -> None:
    columns = ["problem", "conversations"]
    with pytest.raises(DataError, match=r"can be read as plain or llava.*data\.format: plain"):
        choose_format(columns)
    assert choose_format(columns, "llava") == FORMATS["llava"]
    with pytest.raises(DataError, match=r"virl39k, which needs image\+qid\+question, but the columns are: problem, conv"):
        choose_format(columns, "virl39k")
    with pytest.raises(DataError, match="Did you mean 'llava'"):
        choose_format(columns, "lava")


def test_foreign_columns_are_answered_with_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "x?", "label": 3}]), path)
    with pytest.raises(DataError, match=r"its columns: question, label.*llava: conversations"):
        read_examples(path)


def test_a_question_for_rows_that_have_their_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"problem": "x?"}\n')
    with pytest.raises(DataError, match="has questions of its own"):
        read_examples(path, question="y?")


@pytest.mark.parametrize(
    ("text", "content"),
    [("\\boxed{3}", "3"), ("so \\boxed{1} or \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("\\boxed{3", None), ("3", None), ("\\boxed{}", "")],
)
def test_boxes(text: str, content: str | None) -> None:
    assert last_boxed(text) == content
    assert from_virl39k(virl_row(answer=text))["answer"] == (text if content is None else content)


# --- rows on the disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_rows_read_one_by_one_are_the_same(tmp_path: Path, figure: Path, kind: str) -> None:
    rows = [{"id": f"é{n}", "images": ["figure.png"], "problem": f"Question {n} \u2028?"} for n in range(50)]
    path, question = tmp_path / f"train.{kind}", None
    if kind == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)), encoding="utf-8")
    elif kind == "json":
        path.write_text("\ufeff \n" + json.dumps(rows, indent=3, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path, question = tmp_path, "What?"
        for n in range(50):
            (tmp_path / f"{n}.png").symlink_to("figure.png")
    reader = Reader(path, question=question)
    lazy, whole = Rows(reader, [place for place, _ in reader]), read_examples(path, question=question)
    assert len(lazy) == len(whole) == (51 if kind == "folder" else 50)
    assert [lazy[index] for index in reversed(range(len(lazy)))] == whole[::-1]
    assert list(lazy) == whole
    assert list(lazy[3:9:2]) == whole[3:9:2]
    assert list(lazy.take([8, 2])) == [whole[8], whole[2]]
    assert lazy[-1] == whole[-1]
    with pytest.raises(IndexError):
        lazy[len(whole)]


def test_parquet_keeps_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CACHE < 2**30
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"problem": "x" * 1000} for _ in range(100)]), path, row_group_size=10)
    monkeypatch.setattr("vaopd.data.tables.CACHE", 25_000)
    reader = Reader(path)
    rows = Rows(reader, [place for place, _ in reader])
    for index in range(0, 100, 7):
        assert rows[index].id == f"row-{index + 1}"
    assert isinstance(reader.table, Parquet)
    assert len(reader.table._groups) == 2


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"problem": "x?"}\n{"problem": "y?"}\n')
    reader = Reader(path)
    rows = Rows(reader, [place for place, _ in reader])
    assert rows[1].problem == "y?"
    with path.open("a") as file:
        file.write('{"problem": "z?"}\n')
    with pytest.raises(DataError, match="was changed while it was in use"):
        rows[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "x?"}', "must be one JSON array"),
        ("", "must be one JSON array"),
        ("[]", "has no rows"),
        ('[{"problem": "x?"}', "after row 1 there must be"),
        ('[{"problem": "x?"} {"problem": "y?"}]', "after row 1 there must be"),
        ('[{"problem": "x?"}, 3]', "row 2: a row must be a JSON object, found '3'"),
        ('[{"problem": "x?"}, {"problem": "y?]', "row 2: invalid JSON"),
        ('[{"problem": "x?"},', "row 2: a row must be a JSON object, found 'the file has ended'"),
    ],
)
def test_broken_arrays(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_examples(path)


def test_a_long_array_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"problem": "é" * (n % 7) * 5000 + f"{n}?"} for n in range(60)]  # rows of up to 60 kB, and a window of 64
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.problem for row in iterate_rows(path) if isinstance(row, Example)] == [row["problem"] for row in rows]
    path.write_bytes(path.read_bytes()[:-40] + b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_examples(path)
