"""Data sets on disk -> `Example`s, strictly: a row that can't be used stops the reading and is named.

A row has `problem` and optionally `images` (or a single `image`), `answer`, `solution`, `id`; rows of other formats are brought into
these fields first (`vaopd.data.formats`). In JSON an image is a path relative to the data file's folder; in Parquet it is a path, the
encoded bytes, or Hugging Face's `{"bytes", "path"}`. Paths must stay inside the folder, links resolved, and no URL is ever opened.

Unknown keys: JSON in this package's own format refuses them, since such a file was written for it. Files of other people have columns
of their own, so those are ignored and named in one log line, unless the name is nearly one of ours or the column holds images.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from vaopd.data.formats import FIELDS, FORMATS, Format, choose_format, known_formats
from vaopd.data.images import content_hash, decode, png_bytes
from vaopd.data.tables import Fields, Parquet, Place, Raw, Table, kind_of, open_table, short
from vaopd.errors import DataError, did_you_mean
from vaopd.types import Example

if TYPE_CHECKING:
    import pyarrow

IMAGE_MARK = "<image>"

_URL_OR_DRIVE = re.compile(r"[a-z][a-z0-9+.-]*://|(?:file|data|https?|ftp|s3|gs|hf):|[a-z]:[\\/]|//|\\\\", re.IGNORECASE)

log = logging.getLogger(__name__)


def read_examples(path: Path | str, format_: str | None = None, question: str | None = None) -> list[Example]:
    """All rows of a data set in memory, in order; images stay encoded (JSON: paths, so a row is about a kilobyte).

    A row without an `id` is called `row-N`, N its line (JSONL) or row (else) counted from 1. Raises `DataError` for the first
    thing wrong, naming file, row and field.

    Args:
        path: a `.jsonl`, `.json` or `.parquet` file, or a folder of pictures.
        format_: one of `vaopd.data.formats`; None: what the columns tell.
        question: asked of every row, in the place of a question of its own.
    """
    examples = []
    for row in iterate_rows(path, format_, question):
        if isinstance(row, DataError):
            raise row
        examples.append(row)
    return examples


def iterate_rows(path: Path | str, format_: str | None = None, question: str | None = None) -> Iterator[Example | DataError]:
    """Each row as an `Example` or as the `DataError` that names what is wrong with it, for reports over a whole file.

    Raises `DataError` where nothing more can be read: a missing or foreign file, a column that is wrong as a whole, no rows at all.
    """
    for _, row in Reader(path, format_, question):
        yield row


class Reader:
    """Reads the rows of one data set, all in order or one by its place. Arguments and errors as `read_examples`."""

    def __init__(self, path: Path | str, format_: str | None = None, question: str | None = None) -> None:
        self.path, self.question = Path(path), question
        self.table = open_table(self.path)
        with _os_errors(self.path):
            self.format = _format_of(self.table, format_, question)
        self.not_used: set[str] = set()  # columns of a publisher's own

    def __iter__(self) -> Iterator[tuple[Place, Example | DataError]]:
        """Every row with its place, and that no two have one id."""
        seen, empty = dict[int, int](), True  # hash of an id -> its row's number
        with _os_errors(self.path):
            for raw in self.table.rows(self.format.reads):
                empty = False
                yield raw.place, self._checked(raw, seen)
        if empty:
            raise DataError(f"data set '{self.path}' has no rows. Write at least one.")
        if self.not_used:
            log.warning("data set '%s': columns not used: %s", self.path, ", ".join(sorted(self.not_used)))

    def fetch(self, place: Place) -> Example:
        """The row at a place that was good before."""
        with _os_errors(self.path):
            return self._example(place[0], self.table.fetch(place, self.format.reads))

    def remark(self, place: Place) -> str | None:
        """What of a row is left unread."""
        fields = self.table.fetch(place, self.format.reads)
        return None if isinstance(fields, DataError) else self.format.remark(fields)

    def _checked(self, raw: Raw, seen: dict[int, int]) -> Example | DataError:
        where, number = self.table.where(raw.place[0]), raw.place[0]
        try:
            example = self._example(number, raw.fields)
        except DataError as error:
            return error
        # 64 bits of each id: among a million of them two differing ones collide once in 10^7 files, and then loudly.
        first = seen.setdefault(hash(example.id), number)
        if first != number:
            first_where = self.table.where(first)
            return DataError(f"{where}, field 'id': {short(example.id)!r} is already the id of {first_where}. Ids must be unique.")
        return example

    def _example(self, number: int, fields: Fields) -> Example:
        where = self.table.where(number)
        if isinstance(fields, DataError):
            raise fields
        self._check_keys(fields, where)
        if self.question is not None:
            fields = fields | {"problem": self.question}
        try:
            row = self.format.adapt(fields)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        try:
            return _example(row, f"row-{number}", self.table.root, where)
        except DataError as error:
            origin = ", ".join(f"{ours} is its {theirs}" for ours, theirs in self.format.from_columns.items())
            raise DataError(f"{error} (Read as {self.format.name}: {origin}.)" if origin else str(error)) from None

    def _check_keys(self, fields: Mapping[str, Any], where: str) -> None:
        for key in fields:
            if key in self.format.reads or isinstance(self.table, Parquet):
                continue
            if self.format.own:
                raise DataError(f"{where}: unknown field '{short(key)}'.{did_you_mean(key, FIELDS)} Known: {', '.join(FIELDS)}.")
            self.not_used.add(short(key))


class Rows(Sequence[Example]):
    """Some rows of a data set, read from the disk whenever they are asked for; a row costs 24 bytes of memory.

    Args:
        reader: of the data set.
        places: of the rows, each of them good.
    """

    def __init__(self, reader: Reader, places: Sequence[Place] | np.ndarray) -> None:
        self.reader = reader
        self.places = np.asarray(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Example | Rows:
        if isinstance(index, slice):
            return Rows(self.reader, self.places[index])
        number, start, length = self.places[index].tolist()
        return self.reader.fetch((number, start, length))

    def take(self, kept: Sequence[int]) -> Rows:
        """The rows at these indices."""
        return Rows(self.reader, self.places[np.asarray(kept, dtype=np.int64)])


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


# --- which format ----------------------------------------------------------------------------------------------------


class _os_errors:  # noqa: N801 - a context manager, as contextlib's
    """What the operating system says against a data set's file, as a `DataError`. Its own class: a generator may be left inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise DataError(f"data set '{self.path}' can't be read ({error}). Check the file and its permissions.") from error


def _format_of(table: Table, wanted: str | None, question: str | None) -> Format:
    """What the columns tell; own rows of which nothing tells the format are read as such, and refused one by one."""
    columns = table.columns() or []
    if question is not None:
        if "problem" in columns:
            raise DataError(f"data set '{table.path}' has questions of its own, so data.question has no place. Leave one of them out.")
        columns = [*columns, "problem"]
    try:
        found = choose_format(columns, wanted)
    except DataError as error:
        raise DataError(f"data set '{table.path}': {error}") from None
    if found is not None and found.name == "imagefolder" and "problem" not in columns:
        raise DataError(
            f"data set '{table.path}' has pictures but no questions. Add the column 'problem' to its metadata, or ask one of all: "
            "data.question, as in `question: Describe the picture.`"
        )
    if isinstance(table, Parquet):
        return _check_columns(table, found)
    return found or FORMATS["plain"]


def _check_columns(table: Parquet, found: Format | None) -> Format:
    """Others are ignored aloud, or refused when they look like a field under another name."""
    schema, path = table.schema(), table.path
    ignored = [name for name in schema.names if name not in (found.reads if found else FIELDS)]
    if found is None:
        hint = next((hint for name in ignored if (hint := _misspelt(name))), "")
        raise DataError(
            f"data set '{path}' has no column 'problem'; its columns: {', '.join(schema.names)}. {hint}Rename the one with the question. "
            f"(Formats, and the columns that tell them: {known_formats()}.)"
        )
    for name in ignored if found.own else ():
        if hint := _misspelt(name):
            raise DataError(f"data set '{path}': unknown column '{name}'. {hint}Rename or drop it.")
        if _holds_images(schema.field(name).type) and not {"image", "images"} & set(schema.names):
            raise DataError(f"data set '{path}': column '{name}' holds images. Rename it to 'images', or drop it.")
    if ignored:
        log.warning("data set '%s': columns not used: %s", path, ", ".join(ignored))
    return found


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
        raise DataError(f"{where}, field '{field}': must be text, got {kind_of(value)}. Put it in quotes.")
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
        raise DataError(f"{where}, field 'images': must be a list, got {kind_of(several)}. Write [\"figure.png\"].")
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
            f"{where}: must be a path relative to the data file's folder, got {kind_of(value) if value != '' else 'an empty text'}."
        )
    return _inside(value, root, where)


def _resolved(path: Path) -> Path:
    """`path.resolve()`, with the folder's part of the work done once for all files of a folder."""
    if path.name in ("", "..") or "\0" in path.name or path.is_symlink():
        return path.resolve()
    return _resolved_folder(path.parent) / path.name


@lru_cache(maxsize=1024)
def _resolved_folder(folder: Path) -> Path:
    return folder.resolve()


def _inside(reference: str, root: Path, where: str) -> Path:
    """The file that a reference names, links resolved; refuses whatever isn't an ordinary file inside `root`."""
    if _URL_OR_DRIVE.match(reference):
        raise DataError(
            f"{where}: '{short(reference)}' is a URL or names a drive; none is ever opened. Download the image and give its relative path."
        )
    if reference.startswith("~") or Path(reference).is_absolute():
        raise DataError(f"{where}: '{short(reference)}' is absolute. Give a path relative to the data file's folder, '{root}'.")
    try:
        path = _resolved(root / reference)
        inside, is_file = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: '{short(reference)}' is no usable path ({short(str(error))}).") from None
    if not inside:
        raise DataError(f"{where}: '{short(reference)}' leads outside the data file's folder, '{root}'. Copy the image into it.")
    if not is_file:
        raise DataError(f"{where}: '{short(reference)}' does not exist in '{root}' or is no file. Check the path.")
    return path
