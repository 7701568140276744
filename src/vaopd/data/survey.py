"""One look at every row of a data set, every picture decoded: what is there, what is wrong, and which rows ask the same."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from vaopd.data.images import content_hash, decode
from vaopd.data.sources import Reader, Rows
from vaopd.data.tables import Place
from vaopd.errors import DataError
from vaopd.types import Example

NAMED = 10  # bad rows that are told in full
BATCH = 256  # rows whose pictures are decoded side by side

OnProgress = Callable[[int, float], None]  # rows done, and which share of the data set that is


def unheard(rows: int, share: float) -> None:
    """An `OnProgress` for nobody."""


@dataclass
class Defects:
    """The rows that can't be used: how many by reason, and the first few in full."""

    by_reason: Counter[str] = field(default_factory=Counter)
    first: list[DataError] = field(default_factory=list)

    def add(self, error: DataError, where: str) -> None:
        """Count one row."""
        self.by_reason[reason_of(error, where)] += 1
        if len(self.first) < NAMED:
            self.first.append(error)

    def __len__(self) -> int:
        return self.by_reason.total()


@dataclass
class Survey:
    """What is in a data set. Every list has one entry per good row, in order."""

    reader: Reader
    places: array[int] = field(default_factory=lambda: array("q"))  # three numbers per row
    digests: list[bytes] = field(default_factory=list)  # of the question and the pixels: equal for copies under any id or encoding
    pictures: int = 0
    text_only: int = 0  # rows without a picture
    without: Counter[str] = field(default_factory=Counter)  # answer, solution -> rows that have none
    remarks: Counter[str] = field(default_factory=Counter)  # what is left unread -> in how many rows
    defects: Defects = field(default_factory=Defects)

    @property
    def rows(self) -> Rows:
        """The good rows."""
        return Rows(self.reader, np.array(self.places))


def survey(
    path: Path, format_: str | None = None, question: str | None = None, *, strict: bool = True, on_progress: OnProgress = unheard
) -> Survey:
    """Look at every row.

    Args:
        path, format_, question: as of `vaopd.data.sources.read_examples`.
        strict: stop at the first row that can't be used; otherwise they are counted and left out.
        on_progress: called every 256 rows.

    Raises:
        DataError: the first bad row with `strict`; a data set that can't be read, or has not one good row.
    """
    found = Survey(Reader(path, format_, question))
    table, done = found.reader.table, 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter's lock
        for batch in _batches(iter(found.reader)):
            for (place, _), result in zip(batch, pool.map(_look, (row for _, row in batch)), strict=True):
                if isinstance(result, DataError):
                    if strict:
                        raise result
                    found.defects.add(result, table.where(place[0]))
                else:
                    _count(found, place, *result)
            done += len(batch)
            on_progress(done, table.progress(batch[-1][0]))
    if not found.digests:
        raise DataError(f"data set '{path}': none of its {done} rows can be used. The first: {found.defects.first[0]}")
    on_progress(done, 1.0)
    return found


def fingerprint(example: Example) -> bytes:
    """A hash of the question and the pixels of its images. Raises `DataError` naming the example for one that can't be decoded."""
    try:
        images = [content_hash(decode(source)) for source in example.images]
    except DataError as error:
        raise DataError(f"example '{example.id}': {error}") from None
    return hashlib.sha256("\0".join([*images, example.problem]).encode()).digest()[:16]


def reason_of(error: DataError, where: str) -> str:
    """What is wrong, without which row, name or number it is wrong with: equal for rows that are wrong alike."""
    text = str(error).removeprefix(where).lstrip(":, ")
    text = re.sub(r"^example '.*?': ", "", text)
    text = re.sub(r"(field )?'[^']*'", lambda quoted: quoted[0] if quoted[1] else "'…'", text)
    return re.sub(r"\d[\d,.]*", "N", text).partition(". ")[0].rstrip(".")


def _look(row: Example | DataError) -> tuple[Example, bytes] | DataError:
    try:
        return row if isinstance(row, DataError) else (row, fingerprint(row))
    except DataError as error:
        return error


def _count(found: Survey, place: Place, example: Example, digest: bytes) -> None:
    found.places.extend(place)
    found.digests.append(digest)
    found.pictures += len(example.images)
    found.text_only += not example.images
    found.without.update(name for name in ("answer", "solution") if getattr(example, name) is None)
    if remark := found.reader.remark(place):
        found.remarks[remark] += 1


def _batches(rows: Iterator[tuple[Place, Example | DataError]]) -> Iterator[list[tuple[Place, Example | DataError]]]:
    while batch := list(islice(rows, BATCH)):
        yield batch
