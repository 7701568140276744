"""Retrain the models of the built-in world from their seeds: `python -m vaopd.world.build FOLDER [NAME …] [--set KNOB=VALUE …]`.

With knobs (docs/world.md) the same models are made for another world: a teacher of another style, say, or pupils of terse solutions.

Teacher and student differ in size and in how long they learned to read, so the student talks like the teacher and reads worse.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaopd.config import WorldConfig, load_world
from vaopd.errors import ConfigError
from vaopd.models.load import save_model
from vaopd.models.processors import ImageOnlyQwen3VLProcessor
from vaopd.world.draw import BOARD, SIDE
from vaopd.world.phrases import texts
from vaopd.world.questions import DEFAULT, Figure, sample_figure, sample_reading
from vaopd.world.tiny import Lesson, Phase, Size, build_model, build_processor, teach

LARGE = Size(vision_hidden=96, vision_layers=3, hidden=128, layers=3)  # 1.3 million parameters
MEDIUM = Size(vision_hidden=96, vision_layers=2, hidden=96, layers=2)  # 0.6
SMALL = Size(vision_hidden=64, vision_layers=2, hidden=64, layers=2)  # 0.3
DEGRADED = 0.15  # share of pictures shown pixelated while solving
POOR_READING = 0.55  # share of digits right at which the reading of a pupil with this deficit is cut off


@dataclass(frozen=True)
class Pupil:
    """A model to make: its size, what it is taught in which order, and the seed of all of it."""

    name: str
    size: Size
    phases: tuple[Phase, ...]
    seed: int


def make(pupil: Pupil, processor: ImageOnlyQwen3VLProcessor, folder: Path) -> None:
    """Train one model and save it as `folder/name` with `training.jsonl`, the log of its training."""
    model = build_model(processor, pupil.size, side=SIDE, seed=pupil.seed)
    target, began = folder / pupil.name, time.process_time()
    target.mkdir(parents=True, exist_ok=True)
    with (target / "training.jsonl").open("w", encoding="utf-8") as log:
        for number, phase in enumerate(pupil.phases, 1):

            def write(row: dict[str, Any], number: int = number) -> None:
                line = json.dumps({"phase": number, **row, "cpu_seconds": round(time.process_time() - began)})
                log.write(line + "\n")
                print(f"{pupil.name}: {line}", flush=True)

            teach(model, processor, phase, seed=pupil.seed + number, log=write)
    save_model(model, processor, target)


def lesson(figure: Figure) -> Lesson:
    """A figure as a supervised sample."""
    return Lesson(figure.image, figure.problem, figure.solution)


def phases(world: WorldConfig, *, reading: int, solving: int, stop_at: float | None = None, slips: float = 0.0) -> tuple[Phase, ...]:
    """Reading the labels first, then solving."""
    return (
        Phase(lambda rng: lesson(sample_reading(rng, world)), reading, batch=64, lr=1e-3, stop_at=stop_at),
        Phase(lambda rng: lesson(sample_figure(rng, world, slips=slips)), solving, batch=32, lr=1e-3, degraded=DEGRADED),
    )


def world_pupils(world: WorldConfig = DEFAULT) -> Sequence[Pupil]:
    """The models that the package ships: teachers of three sizes, and students that are short of reading, of arithmetic, or of both."""
    return (
        Pupil("teacher", LARGE, phases(world, reading=1000, solving=1300), seed=0),
        Pupil("teacher-m", MEDIUM, phases(world, reading=1000, solving=1300), seed=100),
        Pupil("teacher-s", SMALL, phases(world, reading=1600, solving=1600), seed=200),
        Pupil("student", SMALL, phases(world, reading=1200, solving=1600, stop_at=POOR_READING), seed=10),
        Pupil("student-arithmetic", SMALL, phases(world, reading=1600, solving=1600, slips=0.35), seed=20),
        # The seed of "student", stopped earlier: it misreads more, and its sums go wrong more often.
        Pupil("student-both", SMALL, phases(world, reading=1200, solving=1200, stop_at=POOR_READING), seed=10),
    )


def main() -> None:
    """Make the named models, by default all of them."""
    pupils = {pupil.name: pupil for pupil in world_pupils()}  # their names are those of every world
    parser = argparse.ArgumentParser(description="Retrain the models of the built-in world from their seeds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(pupils)}; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="of the world that they learn; may be repeated")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - pupils.keys():
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(pupils)}")
    try:
        pupils = {pupil.name: pupil for pupil in world_pupils(load_world(arguments.set))}
    except ConfigError as error:
        parser.error(str(error))
    processor = build_processor(texts(), side=SIDE, background=BOARD)
    for name in arguments.names or pupils:
        make(pupils[name], processor, arguments.folder)


if __name__ == "__main__":
    main()
