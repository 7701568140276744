"""Everything that is known to be wrong with data sets, made on the spot: rows, whole files, and what looks odd and is right."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from small_processor import encoded, noise

PICTURE = noise(48, 32)
GOOD: dict[str, Any] = {"id": "good", "images": ["good.png"], "problem": "What is x?", "answer": "3"}


@dataclass(frozen=True)
class Defect:
    """A row that can't be used, and what has to be said about it."""

    name: str
    row: Any  # fields that differ from a good row's (None: the field is left out), or a whole line as bytes
    field: str  # where it is wrong
    reason: str  # part of the message
    fix: str  # what to do, part of the message
    files: Mapping[str, bytes] = field(default_factory=dict)  # beside the data set

    def line(self) -> bytes:
        """The row as it stands in the file."""
        if isinstance(self.row, bytes):
            return self.row
        fields = {**GOOD, "id": self.name, **self.row}
        return json.dumps({key: value for key, value in fields.items() if value is not None}).encode()


def png(width: int, height: int, raw: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG written by hand, whose header need not be true. `raw`: its rows, each after a zero byte."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def picture(name: str, data: bytes | None, reason: str, fix: str, *, file: str | None = None) -> Defect:
    """A row whose picture is at fault."""
    file = file or f"{name.replace(' ', '_')}.png"
    return Defect(name, {"images": [file]}, "field 'images', image 1", reason, fix, {} if data is None else {file: data})


def reference(name: str, path: str, reason: str, fix: str) -> Defect:
    """A row that names a file which is not its own."""
    return Defect(name, {"images": [path]}, "field 'images', image 1", reason, fix)


AGAIN, SCALE, RELATIVE = "Export or download it again", "Scale it down", "give its relative path"
DAMAGED_JPEG = bytearray(encoded(PICTURE, "JPEG"))
DAMAGED_JPEG[20:60] = b"\0" * 40

DEFECTS = [
    # pictures
    picture("truncated png", encoded(PICTURE)[:-400], "damaged or cut off", AGAIN),
    picture("truncated jpeg", encoded(PICTURE, "JPEG")[:-300], "damaged or cut off", AGAIN),
    picture("truncated webp", encoded(PICTURE, "WEBP")[:-300], "damaged or cut off", AGAIN),
    picture("damaged tables", bytes(DAMAGED_JPEG), "", AGAIN),
    picture("empty file", b"", "is empty (0 bytes)", AGAIN),
    picture("web page", b"<html>404 not found</html>", "it looks like HTML", "Convert it"),
    picture("gif", encoded(PICTURE, "GIF"), "it looks like a GIF", "Convert it", file="picture.png"),
    picture("tiff", encoded(PICTURE, "TIFF"), "it looks like a TIFF", "Convert it", file="scan.tiff"),
    picture("pdf", b"%PDF-1.7\n", "it looks like a PDF", "Convert it", file="page.jpg"),
    picture("text file", b"not a picture at all", "is no JPEG, PNG or WebP", "Convert it"),
    picture("bomb", png(60_000, 60_000, b"\0" * 1000), "pixels; at most", SCALE),
    picture("large", png(8000, 8000, b"\0" * 1000), "64,000,000 pixels", SCALE),
    picture("animated png", encoded(PICTURE, save_all=True, append_images=[noise(48, 32, 1)]), "animation of 2 frames", "Save the frame"),
    picture(
        "animated webp",
        encoded(PICTURE, "WEBP", save_all=True, append_images=[noise(48, 32, 1)]),
        "animation of 2 frames",
        "Save the frame",
    ),
    picture("wide", encoded(noise(1000, 2)), "1000x2 can't be shown", "Crop it"),
    picture("high", encoded(noise(2, 1000)), "2x1000 can't be shown", "Crop it"),
    # where pictures lie
    reference("missing", "nowhere.png", "does not exist", "Check the path"),
    reference("folder", ".", "is no file", "Check the path"),
    reference("absolute path", "/etc/hostname", "is absolute", "Give a path relative"),
    reference("home", "~/picture.png", "is absolute", "Give a path relative"),
    reference("parent", "../outside.png", "leads outside", "Copy the image into it"),
    reference("symlink", "link.png", "leads outside", "Copy the image into it"),
    reference("url", "https://example.org/x.png", "is a URL", RELATIVE),
    reference("file url", "file:///etc/hostname", "is a URL", RELATIVE),
    reference("private address", "http://169.254.169.254/latest/meta-data", "is a URL", RELATIVE),
    reference("drive", "C:\\pictures\\x.png", "is a URL or names a drive", RELATIVE),
    reference("terminal command", "\x1b]0;red\x07.png", "does not exist", "Check the path"),
    reference("null byte", "a\0b.png", "is no usable path", ""),
    # text
    Defect(
        "more marks than pictures", {"problem": "<image><image>?"}, "'problem'", "2 <image> mark(s) but the row has 1", "Write one mark"
    ),
    Defect("fewer marks", {"problem": "<image>?", "images": ["good.png"] * 2}, "'problem'", "1 <image> mark(s) but", "Write one mark"),
    Defect("mark without a picture", {"problem": "<image>?", "images": None}, "'problem'", "has 0 image(s)", "Write one mark"),
    Defect("no question", {"problem": None}, "the field 'problem'", "is missing", "Every row needs the question's text"),
    Defect("empty question", {"problem": " \n"}, "field 'problem'", "is empty", "Fill it in"),
    Defect("half a character", {"problem": "half \ud800"}, "field 'problem'", "half a surrogate pair", "Save the text as UTF-8"),
    Defect("too long", {"problem": "How long? " * 1000}, "field 'problem'", "more than the 1,024 that", "Shorten it"),
    # types and names
    Defect("number as answer", {"answer": 3}, "field 'answer'", "must be text, got a number", "Put it in quotes"),
    Defect("empty answer", {"answer": ""}, "field 'answer'", "is empty", "or leave it out"),
    Defect("nan", b'{"id": "nan", "problem": "x?", "answer": NaN}', "field 'answer'", "must be text, got a number", "Put it in quotes"),
    Defect("list as question", {"problem": ["x?"]}, "field 'problem'", "must be text, got a list", "Put it in quotes"),
    Defect("text as images", {"images": "good.png"}, "field 'images'", "must be a list, got text", 'Write ["figure.png"]'),
    Defect("number as image", {"images": [7]}, "field 'images', image 1", "must be a path relative", "got a number"),
    Defect("image twice named", {"image": "good.png"}, "'image' and 'images'", "has both", "Keep 'images'"),
    Defect("truth as id", {"id": True}, "field 'id'", "must be text, got true or false", "Put it in quotes"),
    Defect("misspelt field", {"anwser": "3"}, "field 'anwser'", "unknown field", "Did you mean 'answer'"),
    Defect("duplicate id", {"id": "good"}, "field 'id'", "'good' is already the id of", "Ids must be unique"),
    # lines
    Defect("bad utf-8", b'{"id": "latin", "problem": "caf\xe9?"}', "byte 31", "not UTF-8", "Save the file as UTF-8"),
    Defect("torn line", b'{"id": "torn", "problem": "x', "column", "invalid JSON", "Write one JSON object per line"),
    Defect("python's quotes", b"{'problem': 'x?'}", "column 2", "invalid JSON", "Write one JSON object per line"),
    Defect("no object", b'["x?"]', "a row", "must be a JSON object", '{"problem": …}'),
    Defect("field twice", b'{"problem": "x?", "problem": "y?"}', "field 'problem'", "is given twice", "Keep one"),
    Defect("endless nesting", b'{"problem": ' + b"[" * 100_000, "JSON", "can't be read", "Write one plain JSON object"),
]


def write_defects(folder: Path) -> Path:
    """A good row, then every defect on a line of its own: `Defect` n on line n + 2."""
    (folder / "good.png").write_bytes(encoded(PICTURE))
    (folder.parent / "outside.png").write_bytes(encoded(PICTURE))
    os.symlink(folder.parent / "outside.png", folder / "link.png")
    for defect in DEFECTS:
        for name, data in defect.files.items():
            (folder / name).write_bytes(data)
    lines = [json.dumps(GOOD).encode(), *(defect.line() for defect in DEFECTS)]
    (folder / "train.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder / "train.jsonl"


# --- files as a whole ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadSet:
    """A data set that can't be used as a whole; `make` returns what `data` says in the recipe."""

    name: str
    make: Callable[[Path], dict[str, Any]]
    says: tuple[str, ...]  # reason and fix


def _set(name: str, content: bytes) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / name).write_bytes(content)
        return {"train": str(folder / name)}

    return make


def _missing(folder: Path) -> dict[str, Any]:
    _set("train.jsonl", b"")(folder)
    return {"train": str(folder / "trian.jsonl")}


def _parquet(*columns: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(columns, "x?")]), folder / "train.parquet")
        return {"train": str(folder / "train.parquet")}

    return make


def _pictures_alone(folder: Path) -> dict[str, Any]:
    (folder / "good.png").write_bytes(encoded(PICTURE))
    return {"train": str(folder)}


def _held_out_row_in_training(folder: Path) -> dict[str, Any]:
    """Under another id and in another encoding: the words and the pixels are what counts."""
    (folder / "good.png").write_bytes(encoded(PICTURE))
    (folder / "again.webp").write_bytes(encoded(PICTURE, "WEBP", lossless=True))
    (folder / "train.jsonl").write_text(json.dumps(GOOD) + "\n")
    (folder / "test.jsonl").write_text(json.dumps({**GOOD, "id": "t1", "images": ["again.webp"]}) + "\n")
    return {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}


BAD_SETS = [
    BadSet("no file", _missing, ("does not exist", "Did you mean 'train.jsonl'")),
    BadSet("no rows", _set("train.jsonl", b"\n\n"), ("has no rows", "Write at least one")),
    BadSet("another kind of file", _set("train.csv", b"problem\nx?\n"), ("must end in .jsonl", ".parquet")),
    BadSet("no parquet", _set("train.parquet", b"PAR1 and nothing"), ("no readable Parquet file", "Export or download it again")),
    BadSet("misspelt column", _parquet("problems"), ("no column 'problem'", "Did you mean 'problem' for 'problems'")),
    BadSet("columns that tell nothing", _parquet("prompt", "completion"), ("no column 'problem'", "Rename the one with the question")),
    BadSet("pictures without a question", _pictures_alone, ("pictures but no questions", "data.question")),
    BadSet("broken array", _set("train.json", b'[{"problem": "x?"} {"problem": "y?"}]'), ("there must be ',' or ']'", "after row 1")),
    BadSet("not one good row", _set("train.jsonl", b'{"problem": 1}\n'), ("1 of 1 rows can't be used", "Put it in quotes")),
    BadSet(
        "a test question in training", _held_out_row_in_training, ("1 of 1 rows of data.test", "'t1' (trained as 'good')", "Take them out")
    ),
]


# --- odd and right ------------------------------------------------------------------------------------------------------


def _exif(orientation: int) -> bytes:
    """What a camera stores that was held in one of eight ways, for a picture that stands upright."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose
    stored = PICTURE if orientation == 1 else PICTURE.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, exif=exif)


def _transparent() -> bytes:
    """Half of it lies under a mask that hides nothing but white."""
    image = PICTURE.convert("RGBA")
    image.paste((255, 255, 255, 0), (0, 0, 24, 32))
    return encoded(image)


def _half_white() -> Image.Image:
    image = PICTURE.copy()
    image.paste((255, 255, 255), (0, 0, 24, 32))
    return image


GREY = PICTURE.convert("L")
PALETTE = PICTURE.quantize(64)
SIXTEEN = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.asarray(GREY).astype(np.uint16) * 257)
CMYK = Image.new("CMYK", (48, 32), (0, 255, 255, 0))

# name -> (an encoding, the picture that it must be shown as, the largest difference of a channel)
LEGAL: dict[str, tuple[bytes, Image.Image, int]] = {
    "jpeg called png": (encoded(PICTURE, "JPEG", quality=100, subsampling=0), PICTURE, 6),
    "cmyk": (encoded(CMYK, "JPEG", quality=100), Image.new("RGB", (48, 32), (255, 0, 0)), 4),
    "palette": (encoded(PALETTE), PALETTE.convert("RGB"), 0),
    "transparency": (_transparent(), _half_white(), 0),
    "grey with alpha": (encoded(GREY.convert("LA")), GREY.convert("RGB"), 0),
    "16 bit": (png(48, 32, SIXTEEN, depth=16, colour=0), GREY.convert("RGB"), 0),
    "one bit": (encoded(GREY.convert("1")), GREY.convert("1").convert("RGB"), 0),
    "1x1": (encoded(noise(1, 1)), noise(1, 1), 0),
    "thin": (encoded(noise(3, 300)), noise(3, 300), 0),
    **{f"exif {orientation}": (_exif(orientation), PICTURE, 0) for orientation in range(1, 9)},
}
