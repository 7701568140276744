"""Checks of whole data sets before a model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from vaopd.data.images import content_hash, decode
from vaopd.errors import DataError
from vaopd.types import Example


def fingerprints(examples: Sequence[Example]) -> dict[str, str]:
    """example id -> a hash of its question and the pixels of its images, so that a copy is found under any id or encoding.

    Every image is decoded on the way.

    Raises:
        DataError: an image can't be decoded; names the example.
    """
    found = {}
    for example in examples:
        try:
            images = [content_hash(decode(source)) for source in example.images]
        except DataError as error:
            raise DataError(f"example '{example.id}': {error}") from None
        found[example.id] = hashlib.sha256("\0".join([*images, example.problem]).encode()).hexdigest()
    return found


def check_disjoint(train: Sequence[Example], held_out: Mapping[str, Sequence[Example]]) -> None:
    """Refuse held-out questions that are also trained on. `held_out`: name of the set -> its rows.

    Raises:
        DataError: names the set and some of the rows.
    """
    trained = {value: key for key, value in fingerprints(train).items()}
    for name, examples in held_out.items():
        shared = [(trained[value], key) for key, value in fingerprints(examples).items() if value in trained]
        if shared:
            pairs = ", ".join(f"'{held}' (trained as '{row}')" for row, held in shared[:3])
            raise DataError(
                f"{len(shared)} of {len(examples)} rows of data.{name} have the question and the pictures of a training row: {pairs}. "
                "Take them out of one of the two files"
            )
