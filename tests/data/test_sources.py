"""Data sets on disk: what is read, what is refused, and that each refusal names file, row, field and fix."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from small_processor import encoded, noise

from vaopd.data.images import content_hash, decode
from vaopd.data.sources import iterate_rows, read_examples, split_marks, write_examples
from vaopd.errors import DataError
from vaopd.types import Example

ROW: dict[str, Any] = {"images": ["figure.png"], "problem": "What is x?"}


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


def test_jsonl(figure: Path) -> None:
    full = {"id": "a", "image": "figure.png", "problem": "<image>What?", "answer": "3", "solution": "It is 3."}
    examples = read_examples(jsonl(figure.parent, full, ROW, "", {"problem": "2 + 2?", "answer": None, "id": 7}))
    assert examples == [
        Example("a", (figure,), "<image>What?", "3", "It is 3."),
        Example("row-2", (figure,), "What is x?"),
        Example("7", (), "2 + 2?"),
    ]


def test_unnamed_rows_are_called_by_their_line(figure: Path) -> None:
    path = jsonl(figure.parent, ROW, "", ROW)
    assert [example.id for example in read_examples(path)] == ["row-1", "row-3"]
    assert read_examples(path) == read_examples(str(path))


def test_byte_order_mark(figure: Path) -> None:
    path = figure.parent / "train.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert len(read_examples(path)) == 1


@pytest.mark.parametrize("image", [{"bytes": encoded(noise()), "path": "../never-opened.png"}, encoded(noise()), "figure.png"])
@pytest.mark.parametrize("field", ["images", "image"])
def test_parquet(figure: Path, image: Any, field: str) -> None:
    rows = [{field: [image] if field == "images" else image, "problem": f"<image>Question {n}?", "answer": str(n)} for n in range(100)]
    examples = read_examples(parquet(figure.parent, rows))
    assert [example.id for example in examples] == [f"row-{n}" for n in range(1, 101)]
    assert [example.answer for example in examples] == [str(n) for n in range(100)]
    assert {content_hash(decode(example.images[0])) for example in examples} == {content_hash(noise())}


def test_parquet_struct_with_a_path_only(figure: Path) -> None:
    schema = pyarrow.schema(
        [
            ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))),
            ("problem", pyarrow.string()),
        ]
    )
    row = {"images": [{"bytes": None, "path": "figure.png"}], "problem": "x?"}
    path = figure.parent / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row], schema=schema), path)
    assert read_examples(path)[0].images == (figure,)


def test_foreign_parquet_columns_are_ignored_aloud(figure: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = parquet(figure.parent, [{**ROW, "idx": 3, "question": "?", "level": "hard"}])
    with caplog.at_level(logging.WARNING):
        assert len(read_examples(path)) == 1
    assert "columns not used: idx, question, level" in caplog.text


def test_write_and_read_again(tmp_path: Path) -> None:
    picture = encoded(noise())
    examples = [
        Example("é\n1", (picture, encoded(noise(5, 9), "WEBP", lossless=True)), "<image> or <image>? \u2028 ∠A", "3", None),
        Example("2", (picture,), "What?", None, "A <think> line\nand another."),
        Example("3", (), "2 + 2?"),
    ]
    path = write_examples(iter(examples), tmp_path / "set", "train")
    assert path == tmp_path / "set" / "train.jsonl"
    again = read_examples(path)
    assert [(e.id, e.problem, e.answer, e.solution) for e in again] == [(e.id, e.problem, e.answer, e.solution) for e in examples]
    assert [[content_hash(decode(i)) for i in e.images] for e in again] == [[content_hash(decode(i)) for i in e.images] for e in examples]
    assert len(list((tmp_path / "set" / "images").iterdir())) == 2  # one file per picture
    assert write_examples(again, tmp_path / "set", "train").read_bytes() == path.read_bytes()


def test_interrupted_writing_leaves_no_data_set(tmp_path: Path) -> None:
    examples = [Example("1", (), "x?"), Example("2", (b"damaged",), "x?")]
    with pytest.raises(DataError):
        write_examples(examples, tmp_path)
    assert not (tmp_path / "data.jsonl").exists()


# --- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "images", "parts"),
    [
        ("What?", 0, ["What?"]),
        ("What?", 2, [None, None, "What?"]),
        ("<image>What?", 1, [None, "What?"]),
        ("Is <image> or <image> larger?", 2, ["Is ", None, " or ", None, " larger?"]),
        ("<image><image>", 2, [None, None]),
        ("<Image> < image>", 0, ["<Image> < image>"]),
    ],
)
def test_marks(problem: str, images: int, parts: list[str | None]) -> None:
    assert split_marks(problem, images) == parts


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED_ROWS: list[tuple[Any, str]] = [
    ({**ROW, "anwser": "3"}, "unknown field 'anwser'. Did you mean 'answer'"),
    ({**ROW, "zzz": "3"}, "unknown field 'zzz'. Known: id, images"),
    ({"images": ["figure.png"]}, "'problem' is missing"),
    ({"problem": None}, "'problem' is missing"),
    ({"problem": " \n"}, "field 'problem': is empty"),
    ({"problem": 3}, "field 'problem': must be text, got a number"),
    ({"problem": ["x"]}, "field 'problem': must be text, got a list"),
    ({**ROW, "answer": 3}, "field 'answer': must be text, got a number. Put it in quotes"),
    ({**ROW, "answer": ""}, "field 'answer': is empty. Fill it in or leave it out"),
    ({**ROW, "solution": {}}, "field 'solution': must be text, got an object"),
    ({**ROW, "id": True}, "field 'id': must be text, got true or false"),
    ({**ROW, "id": 1.5}, "field 'id': must be text"),
    ({**ROW, "images": "figure.png"}, "field 'images': must be a list, got text"),
    ({**ROW, "images": [3]}, "field 'images', image 1: must be a path"),
    ({**ROW, "images": ["figure.png", None]}, "image 2: must be a path"),
    ({**ROW, "images": [""]}, "an empty text"),
    ({**ROW, "images": [{"url": "x"}]}, "must be a path"),
    ({**ROW, "image": "figure.png"}, "both 'image' and 'images'"),
    ({**ROW, "problem": "<image><image>?"}, "2 <image> mark(s) but the row has 1 image(s)"),
    ({"problem": "<image>?"}, "1 <image> mark(s) but the row has 0 image(s)"),
    ({"problem": "half \ud800"}, "half a surrogate pair at character 5"),
    ({**ROW, "images": ["gone.png"]}, "'gone.png' does not exist"),
    ({**ROW, "images": ["."]}, "is no file"),
    ({**ROW, "images": ["x\0y.png"]}, "no usable path"),
    ({**ROW, "images": ["a" * 5000]}, "…'"),
    ([1], "must be a JSON object"),
    ("{'problem': 1}", "invalid JSON at column 2"),
    ('{"problem": "x"', "invalid JSON"),
    ('{"problem": "x", "problem": "y"}', "'problem' is given twice"),
    ('{"problem": ' + "[" * 100_000, "can't be read"),
    ('{"problem": ' + "1" * 5000 + "}", "can't be read"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED_ROWS, ids=range(len(REFUSED_ROWS)))
def test_refused_rows_are_named(figure: Path, row: Any, message: str) -> None:
    path = jsonl(figure.parent, ROW, row)
    with pytest.raises(DataError) as error:
        read_examples(path)
    assert f"{path}, line 2" in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value)) < 600


def test_all_defects_of_a_file_are_reported(figure: Path) -> None:
    rows = list(iterate_rows(jsonl(figure.parent, ROW, *(row for row, _ in REFUSED_ROWS), ROW)))
    assert [isinstance(row, DataError) for row in rows] == [False, *[True] * len(REFUSED_ROWS), False]


def test_duplicate_ids_name_both_rows(figure: Path) -> None:
    path = jsonl(figure.parent, {**ROW, "id": "a"}, {**ROW, "id": "row-3"}, ROW, {**ROW, "id": "a"})
    errors = [str(row) for row in iterate_rows(path) if isinstance(row, DataError)]
    assert "line 3" in errors[0]
    assert "already the id of" in errors[0]
    assert "line 4" in errors[1]
    assert "line 1" in errors[1]


def test_not_utf8(figure: Path) -> None:
    path = figure.parent / "train.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"problem": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_examples(path)


def test_files(tmp_path: Path) -> None:
    jsonl(tmp_path)
    with pytest.raises(DataError, match=r"has no rows"):
        read_examples(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"does not exist.*Did you mean 'train.jsonl'"):
        read_examples(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        read_examples(tmp_path / "train.csv")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is no file"):
        read_examples(tmp_path / "folder.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "no" / "such.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"images": ["figure.png"], "problems": "x?"}], "no column 'problem'.*Did you mean 'problem' for 'problems'"),
        ([{**ROW, "anwser": "3"}], "unknown column 'anwser'.*Did you mean 'answer'"),
        ([{"problem": "x?", "figure": {"bytes": b"x", "path": "p"}}], "column 'figure' holds images"),
        ([ROW, {**ROW, "images": ["../x.png"]}], "row 2, field 'images', image 1.*outside"),
        ([ROW, {"images": None, "problem": None}], "row 2.*'problem' is missing"),
        ([{**ROW, "answer": 3}], "row 1, field 'answer': must be text"),
        ([{"images": [b""], "problem": "x?"}], "0 bytes"),
    ],
)
def test_parquet_refused(figure: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(parquet(figure.parent, rows))


def test_damaged_parquet(figure: Path) -> None:
    path = parquet(figure.parent, [ROW] * 50)
    data = path.read_bytes()
    for hurt in (b"", b"PAR1", data[: len(data) // 2], b"x" * 100):
        path.write_bytes(hurt)
        with pytest.raises(DataError, match="no readable Parquet file"):
            read_examples(path)


# --- hostile references ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a data set opened the network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("../secret.png", "leads outside"),
        ("a/../../secret.png", "leads outside"),
        ("link.png", "leads outside"),
        ("linked/secret.png", "leads outside"),
        ("../data-evil/secret.png", "leads outside"),  # a string prefix would let it pass
        ("loop.png", "does not exist|no usable path"),
        ("/etc/passwd", "absolute"),
        ("~/secret.png", "absolute"),
        ("file:///etc/passwd", "URL"),
        ("file:secret.png", "URL"),
        ("FILE:///etc/passwd", "URL"),
        ("http://169.254.169.254/latest", "URL"),
        ("https://example.org/x.png", "URL"),
        ("//server/share/x.png", "URL"),
        ("\\\\server\\share\\x.png", "URL"),
        ("C:\\x.png", "URL"),
        ("data:image/png;base64,AAAA", "URL"),
        ("hf://datasets/x/y.png", "URL"),
        ("zip://a.png::http://example.org/x.zip", "URL"),
    ],
)
@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_hostile_reference(tmp_path: Path, reference: str, reason: str, format_: str) -> None:
    folder, evil = tmp_path / "data", tmp_path / "data-evil"
    folder.mkdir()
    evil.mkdir()
    for secret in (tmp_path / "secret.png", evil / "secret.png"):
        secret.write_bytes(encoded(noise()))
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.symlink(evil, folder / "linked")
    os.symlink("loop.png", folder / "loop.png")
    row = {"images": [reference], "problem": "x?"}
    path = jsonl(folder, row) if format_ == "jsonl" else parquet(folder, [row])
    with pytest.raises(DataError, match=f"image 1.*({reason})"):
        read_examples(path)


def test_links_inside_the_folder_and_odd_names_work(figure: Path) -> None:
    os.symlink("figure.png", figure.parent / "link.png")
    (figure.parent / "fig:1 é.png").write_bytes(figure.read_bytes())
    rows = [{**ROW, "images": [name]} for name in ("link.png", "./figure.png", "fig:1 é.png")]
    assert len(read_examples(jsonl(figure.parent, *rows))) == 3
