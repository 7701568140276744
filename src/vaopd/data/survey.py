"""One look at every row of a data set, every picture decoded: what is there, what is wrong, and which rows ask the same."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from vaopd.data.images import content_hash, decode
from vaopd.data.sources import Reader, Rows
from vaopd.data.tables import Place, short
from vaopd.errors import DataError
from vaopd.types import Example
from vaopd.views import Size

NAMED, AT_MOST = 10, 200  # bad rows that are told in full: of one reason, and in all
BATCH = 256  # rows whose pictures are decoded side by side

OnProgress = Callable[[int, float], None]  # rows done, and which share of the data set that is
RowCheck = Callable[[Example, Sequence[Size]], int]  # a row, (width, height) of its pictures -> tokens of its prompt; raises DataError


def unheard(rows: int, share: float) -> None:
    """An `OnProgress` for nobody."""


@dataclass
class Defects:
    """The rows that can't be used: how many by reason, and the first few of each in full."""

    by_reason: Counter[str] = field(default_factory=Counter)
    first: list[DataError] = field(default_factory=list)

    def add(self, error: DataError, where: str) -> None:
        """Count one row."""
        reason = reason_of(error, where)
        if self.by_reason[reason] < NAMED and len(self.first) < AT_MOST:
            self.first.append(error)
        self.by_reason[reason] += 1

    def __len__(self) -> int:
        return self.by_reason.total()


@dataclass
class Remarks:
    """What is odd about rows that can be used: in how many, and the first of them."""

    rows: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, remark: str, where: str) -> None:
        """Count one row."""
        self.rows[remark] += 1
        self.first.setdefault(remark, where)

    def __iter__(self) -> Iterator[str]:
        return (f"{count} rows {remark}; the first: {self.first[remark]}" for remark, count in self.rows.items())


@dataclass
class Survey:
    """What is in a data set. Every list has one entry per good row, in order."""

    reader: Reader
    places: array[int] = field(default_factory=lambda: array("q"))  # three numbers per row
    digests: list[bytes] = field(default_factory=list)  # of the question and the pixels: equal for copies under any id or encoding
    tokens: array[int] = field(default_factory=lambda: array("q"))  # of the prompt; empty without a check of the rows
    pictures: int = 0
    text_only: int = 0  # rows without a picture
    without: Counter[str] = field(default_factory=Counter)  # answer, solution -> rows that have none
    remarks: Remarks = field(default_factory=Remarks)
    defects: Defects = field(default_factory=Defects)

    @property
    def rows(self) -> Rows:
        """The good rows."""
        return Rows(self.reader, np.array(self.places))


@dataclass(frozen=True)
class _Seen:
    """A row whose pictures were all decoded."""

    example: Example
    digest: bytes
    sizes: list[Size]
    blank: bool  # one of the pictures has a single colour


def survey(
    path: Path,
    format_: str | None = None,
    question: str | None = None,
    *,
    strict: bool = True,
    check: RowCheck | None = None,
    on_progress: OnProgress = unheard,
) -> Survey:
    """Look at every row.

    Args:
        path, format_, question: as of `vaopd.data.sources.read_examples`.
        strict: stop at the first row that can't be used; otherwise they are counted and left out.
        check: what else a row must pass, given the sizes of its pictures.
        on_progress: called every 256 rows.

    Raises:
        DataError: the first bad row with `strict`; a data set that can't be read, or has no rows.
    """
    found = Survey(Reader(path, format_, question))
    table, done = found.reader.table, 0
    asked = set[bytes]()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter's lock
        for batch in _batches(iter(found.reader)):
            wheres = [table.where(place[0]) for place, _ in batch]
            for (place, _), where, result in zip(batch, wheres, pool.map(_look, (row for _, row in batch), wheres), strict=True):
                try:
                    if isinstance(result, DataError):
                        raise result
                    if check is not None:
                        found.tokens.append(_checked(check, result, where))
                except DataError as error:
                    if strict:
                        raise
                    found.defects.add(error, where)
                else:
                    _count(found, place, where, result, asked)
            done += len(batch)
            on_progress(done, table.progress(batch[-1][0]))
    on_progress(done, 1.0)
    return found


def fingerprint(example: Example) -> bytes:
    """A hash of the question and the pixels of its images. Raises `DataError` naming the example for one that can't be decoded."""
    return _decoded(example, f"example '{example.id}'").digest


def reason_of(error: DataError, where: str) -> str:
    """What is wrong, without which row, name or number it is wrong with: equal for rows that are wrong alike."""
    text = str(error).removeprefix(where).lstrip(":, ")
    text = re.sub(r"^example '.*?'[:,] ", "", text)
    text = re.sub(r"(field )?(?<!\w)'[^']*'", lambda quoted: quoted[0] if quoted[1] else "'…'", text)
    return re.sub(r"\d+(?:[.,]\d+)*", "N", text).partition(". ")[0].rstrip(".")


def _look(row: Example | DataError, where: str) -> _Seen | DataError:
    try:
        return row if isinstance(row, DataError) else _decoded(row, _named(where, row))
    except DataError as error:
        return error


def _named(where: str, example: Example) -> str:
    return f"{where}, example '{short(example.id)}'"


def _decoded(example: Example, where: str) -> _Seen:
    hashes, sizes, blank = [], list[Size](), False
    for number, source in enumerate(example.images, 1):
        try:
            image = decode(source)
        except DataError as error:
            raise DataError(f"{where}, field 'images', image {number}: {error}") from None
        hashes.append(content_hash(image))
        sizes.append(image.size)
        blank |= _is_blank(image)
    return _Seen(example, hashlib.sha256("\0".join([*hashes, example.problem]).encode()).digest()[:16], sizes, blank)


def _is_blank(image: Image.Image) -> bool:
    few = image.resize((8, 8), Image.Resampling.NEAREST)  # enough to tell most pictures at once
    return len(few.getcolors() or ()) == 1 and all(low == high for low, high in image.getextrema())  # type: ignore[misc]  # a pair per channel: the image is RGB


def _checked(check: RowCheck, seen: _Seen, where: str) -> int:
    try:
        return check(seen.example, seen.sizes)
    except DataError as error:
        raise DataError(f"{_named(where, seen.example)}, {error}") from None


def _count(found: Survey, place: Place, where: str, seen: _Seen, asked: set[bytes]) -> None:
    example = seen.example
    found.places.extend(place)
    found.digests.append(seen.digest)
    found.pictures += len(example.images)
    found.text_only += not example.images
    found.without.update(name for name in ("answer", "solution") if getattr(example, name) is None)
    if remark := found.reader.remark(place):
        found.remarks.add(remark, where)
    if seen.blank:
        found.remarks.add("with a picture of a single colour, in which there is nothing to see", where)
    if seen.digest in asked:
        found.remarks.add("that ask an earlier row's question about the same pixels", where)
    asked.add(seen.digest)


def _batches(rows: Iterator[tuple[Place, Example | DataError]]) -> Iterator[list[tuple[Place, Example | DataError]]]:
    while batch := list(islice(rows, BATCH)):
        yield batch
