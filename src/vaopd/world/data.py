"""Data sets drawn from the built-in world, in the schema of every other data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vaopd.config import DataConfig, WorldConfig
from vaopd.data.images import png_bytes
from vaopd.data.sources import IMAGE_MARK, write_examples
from vaopd.types import Example
from vaopd.world.questions import figures

SETS = ("train", "eval", "test")


def write_world(world: WorldConfig, folder: Path) -> DataConfig:
    """Write train, eval and test questions to `folder`, unless they are there, and return where they are.

    Every set has its own stream of random numbers, so a larger training set leaves the held-out questions as they are. Two sets can
    draw the same question, but not the same picture of it.
    """
    for name in SETS:
        if not (folder / f"{name}.jsonl").exists():
            write_examples(_examples(name, getattr(world, name), world), folder, name)
    return DataConfig(**{name: folder / f"{name}.jsonl" for name in SETS})


def export_world(world: WorldConfig, folder: Path) -> list[Path]:
    """Write `train.parquet`, `eval.parquet` and `test.parquet` for other people's trainers, and return where they are.

    Columns are Geometry3K's as Hugging Face stores it (`images`: a list of `{bytes, path}`, `problem` with `<image>`, `answer`), and
    `solution`, the worked one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [("images", pa.list_(image)), ("problem", pa.string()), ("answer", pa.string()), ("solution", pa.string())]
    written = []
    for name in SETS:
        rows = [
            {
                "images": [{"bytes": picture, "path": None} for picture in example.images],
                "problem": IMAGE_MARK + example.problem,
                "answer": example.answer,
                "solution": example.solution,
            }
            for example in _examples(name, getattr(world, name), world)
        ]
        written.append(folder / f"{name}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), written[-1])
    return written


def _examples(name: str, size: int, world: WorldConfig) -> Iterator[Example]:
    for index, figure in enumerate(figures(world, name, size)):
        yield Example(f"{name}-{index}", (png_bytes(figure.image),), figure.problem, figure.answer, figure.solution)
