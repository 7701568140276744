"""Files and folders -> raw rows, in order or by their place, so that a data set never has to be in memory.

A place is three numbers (`number, start, length`): which row it is, counted from 1, and where a text file has its bytes. Nothing here
knows what the columns mean (`vaopd.data.formats`) or whether a row can be used (`vaopd.data.sources`).
"""

from __future__ import annotations

import bisect
import codecs
import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

from vaopd.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

log = logging.getLogger(__name__)

Fields = dict[str, Any] | DataError  # of a row, or why it is none
Place = tuple[int, int, int]  # number, start, length

CACHE = 256 * 2**20  # bytes of decoded Parquet row groups that are kept: a small set whole, of a large one what was read last
LONGEST = 64 * 2**20  # characters of one row of a JSON array
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = ("metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Raw:
    """One row before anybody has looked at what it says."""

    place: Place
    fields: Fields


class Table(ABC):
    """A data set on disk."""

    unit = "row"  # how a person counts its rows

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self.root = path, (root or path.parent).resolve()  # root: images lie in it

    def where(self, number: int) -> str:
        """A row's name in messages."""
        return f"{self.path}, {self.unit} {number}"

    @abstractmethod
    def columns(self) -> list[str] | None:
        """The columns; None where no row can be read that would tell."""

    @abstractmethod
    def rows(self, columns: Collection[str]) -> Iterator[Raw]:
        """Every row in order, with at least those of `columns` that it has."""

    @abstractmethod
    def fetch(self, place: Place, columns: Collection[str]) -> Fields:
        """One row again."""

    @abstractmethod
    def progress(self, place: Place) -> float:
        """Which share of the table lies before this row, between 0 and 1."""


def open_table(path: Path) -> Table:
    """A `.jsonl`, `.json` (one array) or `.parquet` file, or a folder of pictures with or without metadata.

    Raises `DataError` for anything else.
    """
    if path.is_dir() and path.suffix.lower() not in _KINDS:
        return _open_folder(path)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"data set '{path}': the name must end in .jsonl (one JSON object per line), .json (one array of objects) or .parquet, "
            f"or be a folder of pictures.{_nearby(path)}"
        )
    if not path.is_file():
        raise DataError(f"data set '{path}' does not exist or is no file.{_nearby(path)}")
    return kind(path)


def content_digest(path: Path) -> str:
    """Hex sha256 of a file; of a folder, over its metadata or else over names and sizes of its pictures."""
    if path.is_dir():
        table = open_table(path)
        if table.path != path:
            return content_digest(table.path)
        names = [raw.fields["file_name"] for raw in table.rows(()) if isinstance(raw.fields, dict)]
        listing = "".join(f"{name}\0{(path / name).stat().st_size}\n" for name in names)
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_folder(folder: Path) -> Table:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"data set '{folder}' has {' and '.join(path.name for path in found)}. Keep one of them.")
    if found:
        return _KINDS[found[0].suffix](found[0])
    if (folder / "metadata.csv").is_file():
        raise DataError(f"data set '{folder}' has a metadata.csv, which isn't read. Write the same rows as metadata.jsonl.")
    inner = sorted(child.name for child in folder.iterdir() if child.is_dir() and any((child / name).is_file() for name in METADATA))
    if inner:
        raise DataError(f"data set '{folder}' has its metadata in {', '.join(inner)}. Name one of these folders.")
    return Pictures(folder)


def _nearby(path: Path) -> str:
    return did_you_mean(path.name, sorted(p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Text(Table):
    """Rows that lie in a text file one after the other; a place holds their bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: BinaryIO | None = None
        self._stamp = (0, 0)

    def columns(self) -> list[str] | None:
        for raw in self.rows(()):
            if not isinstance(raw.fields, DataError):
                return list(raw.fields)
        return None

    def fetch(self, place: Place, columns: Collection[str]) -> Fields:
        number, start, length = place
        file = self._opened()
        if self._stat(file) != self._stamp:
            raise DataError(f"data set '{self.path}' was changed while it was in use. Put it back, or start again.")
        return _parse(os.pread(file.fileno(), length, start), self.where(number))

    def progress(self, place: Place) -> float:
        return place[1] / max(1, self.path.stat().st_size)

    def _opened(self) -> BinaryIO:
        """The file as it was when it was first looked at, also if another has taken its name since."""
        if self._file is None:
            self._file = self.path.open("rb")
            self._stamp = self._stat(self._file)
        return self._file

    @staticmethod
    def _stat(file: BinaryIO) -> tuple[int, int]:
        found = os.fstat(file.fileno())
        return found.st_size, found.st_mtime_ns


class JsonLines(_Text):
    """One JSON object per line; empty lines are passed over."""

    unit = "line"

    def rows(self, columns: Collection[str]) -> Iterator[Raw]:
        """Every line."""
        self._opened()
        with self.path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Raw((number, start, len(line)), _parse(line, self.where(number)))
                start += len(line)


class JsonArray(_Text):
    """One array of JSON objects, read piece by piece."""

    def rows(self, columns: Collection[str]) -> Iterator[Raw]:
        """Every element. Raises `DataError` where the array as such is broken, since no row can be told after that."""
        self._opened()
        with self.path.open("rb") as file:
            for number, (start, element) in enumerate(_elements(file, self.path), 1):
                yield Raw((number, start, len(element)), _parse(element, self.where(number)))


def _elements(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(start, bytes) of every element of the array."""
    scan = _Scan(file, path)
    if scan.next_sign() != "[":
        raise DataError(f"data set '{path}' must be one JSON array of objects, [{{…}}, {{…}}]; for one object per line name it .jsonl.")
    scan.skip()
    while (sign := scan.next_sign()) != "]":
        if sign != "{":
            raise DataError(f"data set '{path}', row {scan.done + 1}: a row must be a JSON object, found {sign or 'the file has ended'!r}.")
        yield scan.element()
        if scan.next_sign() == ",":
            scan.skip()
        elif scan.next_sign() != "]":
            raise DataError(f"data set '{path}': after row {scan.done} there must be ',' or ']', found {scan.next_sign() or 'nothing'!r}.")


class _Scan:
    """A window that moves over a JSON text."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.done = file, path, 0
        self.text, self.at, self.start = "", 0, 0  # the window, a place in it, and the byte at which that place is
        self.decode = codecs.getincrementaldecoder("utf-8")()
        self.ended = False
        if self.next_sign() == "\ufeff":
            self.skip()

    def next_sign(self) -> str:
        """The first character from here that isn't white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.skip()
            if self.at < len(self.text) or not self._more(1 << 16):
                return self.text[self.at : self.at + 1]

    def skip(self, count: int = 1) -> None:
        """Go on by some characters."""
        self.start += len(self.text[self.at : self.at + count].encode())
        self.at += count

    def element(self) -> tuple[int, bytes]:
        """(start, bytes) of the element that begins here."""
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self.text, self.at)
                break
            except (ValueError, RecursionError) as error:
                # The window may end inside the element. It doubles, so a long element is decoded a few times and not quadratically often.
                seen = len(self.text) - self.at
                if seen > LONGEST or not self._more(max(seen, 1 << 16)):
                    raise DataError(f"data set '{self.path}', row {self.done + 1}: invalid JSON ({error}).") from None
        start, element = self.start, self.text[self.at : end]
        self.done += 1
        self.skip(end - self.at)
        return start, element.encode()

    def _more(self, size: int) -> bool:
        if self.ended:
            return False
        piece = self.file.read(size)
        self.ended = not piece
        try:
            self.text, self.at = self.text[self.at :] + self.decode.decode(piece, final=self.ended), 0
        except UnicodeDecodeError:
            raise DataError(f"data set '{self.path}' is not UTF-8 after row {self.done}. Save the file as UTF-8.") from None
        return not self.ended


def _parse(line: bytes, where: str) -> Fields:
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
        return DataError(f'{where}: a row must be a JSON object like {{"problem": …}}, got {kind_of(row)}.')
    return row


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise DataError(f"field '{short(key)}' is given twice. Keep one.")
        row[key] = value
    return row


# --- Parquet ---------------------------------------------------------------------------------------------------------


class Parquet(Table):
    """A Parquet file, read row group by row group."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._lock = Lock()
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._file: pyarrow.parquet.ParquetFile | None = None
        self._ends: list[int] = []  # rows up to the end of each group

    def schema(self) -> pyarrow.Schema:
        """Of the file."""
        return self._open().schema_arrow

    def columns(self) -> list[str]:
        """Of the schema."""
        return list(self.schema().names)

    def rows(self, columns: Collection[str]) -> Iterator[Raw]:
        """Every row, 64 at a time."""
        import pyarrow

        file, number = self._open(), 0
        try:
            for batch in file.iter_batches(batch_size=64, columns=self._of(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield Raw((number, 0, 0), row)
        except (pyarrow.ArrowException, ValueError) as error:
            raise self._unreadable(error) from error

    def fetch(self, place: Place, columns: Collection[str]) -> Fields:
        """A row of a group that is kept as long as there is room."""
        self._open()
        row = place[0] - 1
        group = bisect.bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        with self._lock:
            return self._group(group, columns).slice(row - first, 1).to_pylist()[0]

    def progress(self, place: Place) -> float:
        """By rows."""
        self._open()
        return place[0] / max(1, self._ends[-1])

    def _group(self, group: int, columns: Collection[str]) -> pyarrow.Table:
        import pyarrow

        if group not in self._groups:
            try:
                self._groups[group] = self._open().read_row_group(group, columns=self._of(columns))
            except (pyarrow.ArrowException, ValueError) as error:
                raise self._unreadable(error) from error
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > CACHE:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]

    def _of(self, columns: Collection[str]) -> list[str]:
        return [name for name in self.schema().names if name in columns]

    def _open(self) -> pyarrow.parquet.ParquetFile:
        if self._file is None:
            import pyarrow
            import pyarrow.parquet

            try:
                self._file = pyarrow.parquet.ParquetFile(self.path)
            except (pyarrow.ArrowException, ValueError) as error:
                raise self._unreadable(error) from error
            meta, end = self._file.metadata, 0
            for group in range(meta.num_row_groups):
                self._ends.append(end := end + meta.row_group(group).num_rows)
        return self._file

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"data set '{self.path}' is no readable Parquet file ({error}). Export or download it again.")


# --- pictures --------------------------------------------------------------------------------------------------------


class Pictures(Table):
    """A folder of pictures without metadata: a row per picture, called by its path, in the order of the paths."""

    unit = "picture"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder)
        self._names: list[str] | None = None

    def columns(self) -> list[str]:
        """The picture's name, which is also its id."""
        return ["id", "file_name"]

    def rows(self, columns: Collection[str]) -> Iterator[Raw]:
        """Every picture below the folder; files of other kinds and hidden ones are counted aloud."""
        for number in range(1, len(self._listed()) + 1):
            yield Raw((number, 0, 0), self.fetch((number, 0, 0), columns))

    def fetch(self, place: Place, columns: Collection[str]) -> Fields:
        """The picture's name."""
        name = self._listed()[place[0] - 1]
        return {"id": name, "file_name": name}

    def progress(self, place: Place) -> float:
        """By pictures."""
        return place[0] / max(1, len(self._listed()))

    def _listed(self) -> list[str]:
        if self._names is None:
            files = [path.relative_to(self.path) for path in self.path.rglob("*") if not path.is_dir()]
            self._names = sorted(file.as_posix() for file in files if _is_picture(file))
            if other := len(files) - len(self._names):
                log.warning("data set '%s': %d files that are no pictures (%s) are not used", self.path, other, ", ".join(PICTURES))
        return self._names


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and not any(part.startswith(".") for part in file.parts)


_KINDS: dict[str, type[Table]] = {".jsonl": JsonLines, ".json": JsonArray, ".parquet": Parquet}


# --- words for messages ----------------------------------------------------------------------------------------------


def short(text: str) -> str:
    """At most 120 characters."""
    return text if len(text) <= 120 else f"{text[:117]}…"


def kind_of(value: object) -> str:
    """A value's type in JSON's words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
