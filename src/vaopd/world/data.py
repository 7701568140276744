"""Data sets drawn from the built-in world, in the schema of every other data set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from vaopd.config import DataConfig, WorldConfig
from vaopd.data.images import png_bytes
from vaopd.data.sources import write_examples
from vaopd.types import Example
from vaopd.world.draw import sample_figure


def write_world(world: WorldConfig, folder: Path) -> DataConfig:
    """Write train, eval and test questions to `folder`, unless they are there, and return where they are.

    Every set has its own stream of random numbers, so a larger training set leaves the held-out questions as they are. Two sets can
    draw the same question, but not the same picture of it.
    """
    sizes = {"train": world.train, "eval": world.eval, "test": world.test}
    for name, size in sizes.items():
        if not (folder / f"{name}.jsonl").exists():
            write_examples(_examples(name, size, world.seed), folder, name)
    return DataConfig(**{name: folder / f"{name}.jsonl" for name in sizes})


def _examples(name: str, size: int, seed: int) -> Iterator[Example]:
    rng = random.Random(f"{seed}|{name}")
    for index in range(size):
        figure = sample_figure(rng)
        yield Example(f"{name}-{index}", (png_bytes(figure.image),), figure.problem, figure.answer, figure.solution)
