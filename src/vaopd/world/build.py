"""Retrain the models of the built-in world from their seeds: `python -m vaopd.world.build FOLDER [NAME …]`.

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

from vaopd.models.load import ImageOnlyQwen3VLProcessor, save_model
from vaopd.world import draw
from vaopd.world.tiny import Lesson, Phase, Size, build_model, build_processor, teach

LARGE = Size(vision_hidden=96, vision_layers=3, hidden=128, layers=3)
SMALL = Size(vision_hidden=64, vision_layers=2, hidden=64, layers=2)
DEGRADED = 0.15  # share of pictures shown pixelated while solving


@dataclass(frozen=True)
class Pupil:
    """A model to make: its size, what it is taught in which order, and the seed of all of it."""

    name: str
    size: Size
    phases: tuple[Phase, ...]
    seed: int


def make(pupil: Pupil, processor: ImageOnlyQwen3VLProcessor, folder: Path) -> None:
    """Train one model and save it as `folder/name` with `training.jsonl`, the log of its training."""
    model = build_model(processor, pupil.size, side=draw.SIDE, seed=pupil.seed)
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


def lesson(figure: draw.Figure) -> Lesson:
    """A figure as a supervised sample."""
    return Lesson(figure.image, figure.problem, figure.solution)


def world_pupils() -> Sequence[Pupil]:
    """The teacher and the student that the package ships."""

    def phases(reading: int, solving: int) -> tuple[Phase, ...]:
        return (
            Phase(lambda rng: lesson(draw.sample_reading(rng)), reading, batch=64, lr=1e-3),
            Phase(lambda rng: lesson(draw.sample_figure(rng)), solving, batch=32, lr=1e-3, degraded=DEGRADED),
        )

    return (
        Pupil("teacher", LARGE, phases(1000, 1300), seed=0),
        Pupil("student", SMALL, phases(1200, 800), seed=10),
    )


def main() -> None:
    """Make the named models, by default all of them."""
    pupils = {pupil.name: pupil for pupil in world_pupils()}
    parser = argparse.ArgumentParser(description="Retrain the models of the built-in world from their seeds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(pupils)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - pupils.keys():
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(pupils)}")
    processor = build_processor(draw.texts(), side=draw.SIDE, background=draw.BOARD)
    for name in arguments.names or pupils:
        make(pupils[name], processor, arguments.folder)


if __name__ == "__main__":
    main()
