"""The sets of a run: training, held out and test, with no question both trained on and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vaopd.config import DataConfig
from vaopd.data.sources import Rows
from vaopd.data.survey import OnProgress, RowCheck, Survey, fingerprint, survey, unheard
from vaopd.errors import DataError
from vaopd.types import Example


@dataclass(frozen=True)
class DataSets:
    """What a run trains on, chooses its best checkpoint by, and is tested on."""

    train: Rows
    held_out: Sequence[Example]
    test: Sequence[Example]
    surveys: Mapping[str, Survey] = field(default_factory=dict)  # of each file: train, eval, test
    left_out: int = 0  # training rows that ask a held-out question

    @property
    def account(self) -> dict[str, Any]:
        """`data.json` (docs/run_folder.md): where every row of every file has gone."""
        files = {
            name: {"rows": len(found.digests) + len(found.defects), "used": len(found.digests), "skipped": dict(found.defects.by_reason)}
            for name, found in self.surveys.items()
        }
        sizes = {"train": len(self.train), "held_out": len(self.held_out), "test": len(self.test), "left_out": self.left_out}
        return {"files": files, **sizes}

    @property
    def notes(self) -> list[str]:
        """What is to be said of them before a run starts; nothing is left out without a word."""
        skipped = sum(len(found.defects) for found in self.surveys.values())
        sizes = f"{len(self.train)} train · {len(self.held_out)} held out · {len(self.test)} test · {skipped} skipped"
        said = [f"{sizes} · no test question trained on"]
        if self.left_out:
            said.append(f"{self.left_out} training rows left out: they ask a held-out question with the same pictures")
        for name, found in self.surveys.items():
            if found.text_only:
                said.append(f"data.{name}: {found.text_only} of {len(found.digests)} rows without a picture; their tokens weigh alike")
            said += [f"data.{name}: {remark}" for remark in found.remarks]
            said += [f"data.{name}: {count} rows skipped: {reason}" for reason, count in found.defects.by_reason.most_common()]
        return said


def open_sets(
    data: DataConfig,
    *,
    strict: bool | None = None,
    check: RowCheck | None = None,
    on_progress: Callable[[str], OnProgress] = lambda name: unheard,
) -> DataSets:
    """Look at every row of every set, and keep them apart.

    Args:
        strict: stop at the first bad row; None: as the recipe says in `bad_rows`.
        check: what else every row must pass (`vaopd.data.survey.survey`).
        on_progress: name of a set -> whom to tell how far it is.

    Raises:
        DataError: something can't be read or used, or a held-out question is also trained on.
    """
    strict = data.bad_rows == "refuse" if strict is None else strict
    found = {
        name: survey(path, data.format, data.question, strict=strict, check=check, on_progress=on_progress(name))
        for name, path in files_of(data).items()
    }
    return arrange(data, found)


def files_of(data: DataConfig) -> dict[str, Path]:
    """Name of a set -> its file or folder."""
    paths = {"train": data.train, "eval": data.eval, "test": data.test}
    return {name: path for name, path in paths.items() if path is not None}


def arrange(data: DataConfig, found: Mapping[str, Survey]) -> DataSets:
    """The sets of a run from a survey of each file.

    Raises:
        DataError: a file has not one good row, or a held-out question is also trained on.
    """
    for each in found.values():
        if not each.digests:
            rows, first = len(each.defects), each.defects.first[0]
            raise DataError(f"data set '{each.reader.path}': none of its {rows} rows can be used. The first: {first}")
    training = found["train"]
    train, held_out, left_out = training.rows, found["eval"].rows if "eval" in found else training.rows[:0], 0
    digests: Sequence[bytes] = training.digests
    if data.holdout is not None:
        kept, held, left_out = split(training, data.holdout)
        train, held_out, digests = training.rows.take(kept), training.rows.take(held), [training.digests[index] for index in kept]
    for name in found.keys() - {"train"}:
        refuse_shared(train, digests, name, found[name].rows, found[name].digests)
    return DataSets(train, held_out, found["test"].rows if "test" in found else held_out, found, left_out)


def is_held_out(id_: str, share: float) -> bool:
    """Whether the row of this id belongs to the held-out share: its hash decides, so other rows don't matter."""
    return int.from_bytes(hashlib.sha256(f"held out\0{id_}".encode()).digest()[:8]) < share * 2**64


def split(found: Survey, share: float) -> tuple[list[int], list[int], int]:
    """(training rows, held-out rows, how many are in neither): indices of `found.rows`.

    The held-out rows follow from the ids alone. A training row that asks one of their questions about the same pixels under another id is
    in neither.

    Raises:
        DataError: one of the two would be empty.
    """
    held = [index for index, example in enumerate(found.rows) if is_held_out(example.id, share)]
    asked, apart = {found.digests[index] for index in held}, set(held)
    rest = [index for index in range(len(found.digests)) if index not in apart]
    kept = [index for index in rest if found.digests[index] not in asked]
    if not held or not kept:
        raise DataError(
            f"data.holdout: {share:g} of the {len(found.digests)} rows of '{found.reader.path}' leaves {len(kept)} to train on "
            f"and {len(held)} held out. Take another share, or name a file: data.eval"
        )
    return kept, held, len(rest) - len(kept)


def check_disjoint(train: Sequence[Example], held_out: Mapping[str, Sequence[Example]]) -> None:
    """Refuse held-out questions that are also trained on. `held_out`: name of the set -> its rows.

    Raises:
        DataError: names the set and some of the rows; an image can't be decoded.
    """
    digests = [fingerprint(example) for example in train]
    for name, examples in held_out.items():
        refuse_shared(train, digests, name, examples, [fingerprint(example) for example in examples])


def refuse_shared(
    train: Sequence[Example], trained: Iterable[bytes], name: str, held_out: Sequence[Example], digests: Sequence[bytes]
) -> None:
    """As `check_disjoint`, for one set, with the fingerprints known."""
    row_of = {digest: index for index, digest in enumerate(trained)}
    shared = [(index, row_of[digest]) for index, digest in enumerate(digests) if digest in row_of]
    if shared:
        pairs = ", ".join(f"'{held_out[held].id}' (trained as '{train[row].id}')" for held, row in shared[:3])
        raise DataError(
            f"{len(shared)} of {len(held_out)} rows of data.{name} have the question and the pictures of a training row: {pairs}. "
            "Take them out of one of the two files"
        )
