"""Data sets on disk -> `Example`s, strictly: a row that can't be used stops the reading and is named.

A row has `problem` and optionally `images` (or a single `image`), `answer`, `solution`, `id`. In JSONL an image is a path relative to
the data file's folder; in Parquet it is a path, the encoded bytes, or Hugging Face's `{"bytes", "path"}`. Paths must stay inside the
folder, links resolved, and no URL is ever opened.

Unknown keys: JSONL refuses them, since such a file was written for this schema. Parquet files of other people have columns of their
own, so those are ignored and named in one log line, unless the name is nearly one of ours or the column holds images.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaopd.data.images import content_hash, decode, png_bytes
from vaopd.errors import DataError, did_you_mean
from vaopd.types import Example

if TYPE_CHECKING:
    import pyarrow

IMAGE_MARK = "<image>"
FIELDS = ("id", "images", "image", "problem", "answer", "solution")

_URL_OR_DRIVE = re.compile(r"[a-z][a-z0-9+.-]*://|(?:file|data|https?|ftp|s3|gs|hf):|[a-z]:[\\/]|//|\\\\", re.IGNORECASE)

log = logging.getLogger(__name__)


def read_examples(path: Path | str) -> list[Example]:
    """All rows of a `.jsonl` or `.parquet` file, in order; images stay encoded (JSONL: paths, so a row is a few hundred bytes).

    A row without an `id` is called `row-N`, N its line (JSONL) or row (Parquet) counted from 1. Raises `DataError` for the first
    thing wrong, naming file, row and field.
    """
    examples = []
    for row in iterate_rows(path):
        if isinstance(row, DataError):
            raise row
        examples.append(row)
    return examples


def iterate_rows(path: Path | str) -> Iterator[Example | DataError]:
    """Each row as an `Example` or as the `DataError` that names what is wrong with it, for reports over a whole file.

    Raises `DataError` where nothing more can be read: a missing or foreign file, a column that is wrong as a whole, no rows at all.
    """
    path = Path(path)
    root, seen = path.parent.resolve(), dict[str, str]()
    for where, number, row in _rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            example = _example(row, f"row-{number}", root, where)
            if example.id in seen:
                raise DataError(f"{where}, field 'id': {_short(example.id)!r} is already the id of {seen[example.id]}. Ids must be unique.")
            seen[example.id] = where
        except DataError as error:
            yield error
        else:
            yield example


def split_marks(problem: str, n_images: int) -> list[str | None]:
    """The problem as text parts and images (None), in order; without marks the images come first. Empty texts are left out.

    Raises `DataError` when the number of `<image>` marks is neither 0 nor the number of images.
    """
    texts = problem.split(IMAGE_MARK)
    marks = len(texts) - 1
    if marks == 0:
        return [*[None] * n_images, problem]
    if marks != n_images:
        raise DataError(
            f"'problem' has {marks} {IMAGE_MARK} mark(s) but the row has {n_images} image(s). "
            "Write one mark per image, or none to put all images before the text."
        )
    parts: list[str | None] = [texts[0]]
    for text in texts[1:]:
        parts += [None, text]
    return [part for part in parts if part != ""]


def write_examples(examples: Iterable[Example], folder: Path | str, name: str = "data") -> Path:
    """Write `folder/name.jsonl` and its images as `folder/images/<content hash>.png`; returns the path of the JSONL.

    `read_examples` gives the same rows back with the same pixels. Equal pictures share a file. The JSONL appears only once complete.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path, unfinished = folder / f"{name}.jsonl", folder / f".{name}.jsonl.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        for example in examples:
            row = {"id": example.id, "images": [_write_image(image, folder) for image in example.images], "problem": example.problem}
            row |= {field: value for field in ("answer", "solution") if (value := getattr(example, field)) is not None}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
    return path


def _write_image(source: Path | bytes, folder: Path) -> str:
    image = decode(source)
    relative = f"images/{content_hash(image)[:32]}.png"
    if not (folder / relative).exists():
        unfinished = folder / f"{relative}.unfinished"  # an interrupted write must not look like the image
        unfinished.write_bytes(png_bytes(image))
        os.replace(unfinished, folder / relative)
    return relative


# --- reading files into rows -----------------------------------------------------------------------------------------


Row = tuple[str, int, "dict[str, Any] | DataError"]  # where, for messages; number from 1; the fields


def _rows(path: Path) -> Iterator[Row]:
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"data set '{path}': the name must end in .jsonl (one JSON object per line) or .parquet.")
    if not path.is_file():
        raise DataError(f"data set '{path}' does not exist or is no file.{_nearby(path)}")
    empty = True
    try:
        for row in readers[path.suffix.lower()](path):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"data set '{path}' can't be read ({error}). Check the file and its permissions.") from error
    if empty:
        raise DataError(f"data set '{path}' has no rows. Write at least one.")


def _nearby(path: Path) -> str:
    return did_you_mean(path.name, sorted(p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, number, _parse_line(line, where)


def _parse_line(line: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_no_duplicate_keys)
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 (byte {error.start}). Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return DataError(f"{where}: invalid JSON at column {error.colno}: {error.msg}. Write one JSON object per line.")
    except DataError as error:
        return DataError(f"{where}: {error}")
    except (ValueError, RecursionError) as error:  # nested too deeply, or a number of thousands of digits
        return DataError(f"{where}: JSON that can't be read ({error}). Write one plain JSON object per line.")
    if not isinstance(row, dict):
        return DataError(f'{where}: a row must be a JSON object like {{"problem": …}}, got {_kind(row)}.')
    for key in row:
        if key not in FIELDS:
            return DataError(f"{where}: unknown field '{_short(key)}'.{did_you_mean(key, FIELDS)} Known: {', '.join(FIELDS)}.")
    return row


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise DataError(f"field '{_short(key)}' is given twice. Keep one.")
        row[key] = value
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _known_columns(file.schema_arrow, path)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", number, row
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"data set '{path}' is no readable Parquet file ({error}). Export or download it again.") from error


def _known_columns(schema: pyarrow.Schema, path: Path) -> list[str]:
    """The columns to read; others are ignored aloud, or refused when they look like a field under another name."""
    known = [name for name in schema.names if name in FIELDS]
    ignored = [name for name in schema.names if name not in FIELDS]
    if "problem" not in known:
        hint = next((hint for name in ignored if (hint := _misspelt(name))), "")
        raise DataError(
            f"data set '{path}' has no column 'problem'; its columns: {', '.join(schema.names)}. {hint}Rename the one with the question."
        )
    for name in ignored:
        if hint := _misspelt(name):
            raise DataError(f"data set '{path}': unknown column '{name}'. {hint}Rename or drop it.")
        if _holds_images(schema.field(name).type) and not {"image", "images"} & set(known):
            raise DataError(f"data set '{path}': column '{name}' holds images. Rename it to 'images', or drop it.")
    if ignored:
        log.warning("data set '%s': columns not used: %s", path, ", ".join(ignored))
    return known


def _misspelt(name: str) -> str:
    # Nearer than `did_you_mean`: it must be sure enough to refuse, so 'idx' and 'question' are columns of their own.
    near = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.82)
    return f"Did you mean '{near[0]}' for '{name}'? " if near else ""


def _holds_images(kind: pyarrow.DataType) -> bool:
    import pyarrow

    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        kind = kind.value_type
    return pyarrow.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


# --- rows into examples ----------------------------------------------------------------------------------------------


def _example(row: Mapping[str, Any], default_id: str, root: Path, where: str) -> Example:
    images = _images(row, root, where)
    problem = _text(row, "problem", where)
    if problem is None:
        raise DataError(f"{where}: the field 'problem' is missing. Every row needs the question's text.")
    try:
        split_marks(problem, len(images))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Example(
        id=_id(row, default_id, where),
        images=images,
        problem=problem,
        answer=_text(row, "answer", where),
        solution=_text(row, "solution", where),
    )


def _id(row: Mapping[str, Any], default: str, where: str) -> str:
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, "id", where) or default


def _text(row: Mapping[str, Any], field: str, where: str) -> str | None:
    """A text field, None when absent or null."""
    value = row.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}, field '{field}': must be text, got {_kind(value)}. Put it in quotes.")
    if not value.strip():
        raise DataError(f"{where}, field '{field}': is empty. Fill it in{'' if field == 'problem' else ' or leave it out'}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}, field '{field}': half a surrogate pair at character {error.start}. Save the text as UTF-8.") from None
    return value


def _images(row: Mapping[str, Any], root: Path, where: str) -> tuple[Path | bytes, ...]:
    single, several = row.get("image"), row.get("images")
    if single is not None and several is not None:
        raise DataError(f"{where}: has both 'image' and 'images'. Keep 'images'.")
    if single is not None:
        return (_image(single, root, f"{where}, field 'image'"),)
    if several is None:
        return ()
    if not isinstance(several, list):
        raise DataError(f"{where}, field 'images': must be a list, got {_kind(several)}. Write [\"figure.png\"].")
    return tuple(_image(image, root, f"{where}, field 'images', image {index}") for index, image in enumerate(several, 1))


def _image(value: object, root: Path, where: str) -> Path | bytes:
    """A path, encoded bytes or Hugging Face's struct -> what `Example` keeps."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        value = value["bytes"] if value["bytes"] is not None else value["path"]  # with bytes, the path is only a name
    if isinstance(value, bytes):
        if not value:
            raise DataError(f"{where}: 0 bytes. Export the data set again with its images.")
        return value
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: must be a path relative to the data file's folder, got {_kind(value) if value != '' else 'an empty text'}."
        )
    return _inside(value, root, where)


def _inside(reference: str, root: Path, where: str) -> Path:
    """The file that a reference names, links resolved; refuses whatever isn't an ordinary file inside `root`."""
    if _URL_OR_DRIVE.match(reference):
        raise DataError(
            f"{where}: '{_short(reference)}' is a URL or names a drive; none is ever opened. Download the image and give its relative path."
        )
    if reference.startswith("~") or Path(reference).is_absolute():
        raise DataError(f"{where}: '{_short(reference)}' is absolute. Give a path relative to the data file's folder, '{root}'.")
    try:
        path = (root / reference).resolve()
        inside, is_file = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: '{_short(reference)}' is no usable path ({_short(str(error))}).") from None
    if not inside:
        raise DataError(f"{where}: '{_short(reference)}' leads outside the data file's folder, '{root}'. Copy the image into it.")
    if not is_file:
        raise DataError(f"{where}: '{_short(reference)}' does not exist in '{root}' or is no file. Check the path.")
    return path


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}…"


def _kind(value: object) -> str:
    """A value's type in JSON's words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
