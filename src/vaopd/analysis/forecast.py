"""How long a study takes: from its finished cells where there are any, else from a few timed steps on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vaopd.analysis.cell import COST, DONE, FIXED_QUESTIONS
from vaopd.analysis.matrix import Cell
from vaopd.config import DataConfig, RunConfig, WorldConfig
from vaopd.data.sources import read_examples, write_examples
from vaopd.evaluate.held_out import CONDITIONS, SCORED_SIBLINGS, decoder, sampler
from vaopd.evaluate.runner import answer, teacher_advantages
from vaopd.train.folder import read_rows
from vaopd.train.schedule import total_steps
from vaopd.train.setup import READS_THE_IMAGE_ONCE, held_out_sampling, set_up, weighting_of
from vaopd.train.step import train_step
from vaopd.world.data import write_world

STEPS = 3  # timed; the first one warms up
RESPONSES = 128  # about as many as an evaluation decodes side by side


@dataclass(frozen=True)
class Costs:
    """Seconds of what a cell is made of."""

    rollout: float  # trained on
    response: float  # sampled in an evaluation
    scored: float  # by the teacher in two views
    start: float  # of a process


@dataclass(frozen=True)
class Forecast:
    """Cells of one phase, regime and method, and how long one takes."""

    phase: str
    regime: str | None
    method: str
    cells: int
    done: int
    seconds: float  # of one cell
    source: str  # where that is from


def forecast(cells: Sequence[Cell], sizes: Mapping[str, tuple[int, int, int]], costs: Costs | None) -> list[Forecast]:
    """One entry for each phase, regime and method, in the order of the cells.

    Args:
        sizes: cell -> rows of its training, held-out and test set.
        costs: calibrated, for cells of whose kind none is finished; not read where every kind has one.
    """
    groups: dict[tuple[str, str | None, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.phase, cell.place.regime, str(cell.method)), []).append(cell)
    found = []
    for (phase, regime, method), members in groups.items():
        finished = [seconds for cell in members if (seconds := measured_seconds(cell)) is not None]
        if finished:
            seconds, source = statistics.mean(finished), f"measured on {len(finished)} finished"
        else:
            assert costs is not None  # the caller calibrates where a kind has no finished cell
            seconds, source = statistics.mean(estimated_seconds(c.config, sizes[c.name], costs) for c in members), "calibrated"
        found.append(Forecast(phase, regime, method, len(members), len(finished), seconds, source))
    return found


def remaining_seconds(entries: Sequence[Forecast], workers: int) -> float:
    """What is left, side by side on the cores."""
    return sum((entry.cells - entry.done) * entry.seconds for entry in entries) / workers


def measured_seconds(cell: Cell) -> float | None:
    """Wall-clock seconds of a finished cell, all its pieces together; None where it isn't finished."""
    run = cell.config.run
    return sum(row["seconds"] for row in read_rows(run / COST)) if (run / DONE).exists() else None


def estimated_seconds(config: RunConfig, sizes: tuple[int, int, int], costs: Costs) -> float:
    """Of a cell that trains on and evaluates so many rows."""
    train, held_out, test = sizes
    steps = total_steps(config.optim, train)
    k = 1 if config.method.off_policy else config.rollouts.k
    asked = min(held_out, config.eval.questions or held_out) * (1 + -(-steps // config.eval.every))
    final, siblings = test or held_out, min(config.eval.k, SCORED_SIBLINGS)
    responses = asked * config.eval.k + CONDITIONS * final * config.eval.k
    scored = asked * min(config.rollouts.k, siblings) + final * siblings + min(final, FIXED_QUESTIONS)
    rollouts = steps * config.optim.prompts_per_step * k
    return costs.start + rollouts * costs.rollout + responses * costs.response + scored * costs.scored


def dearest(cells: Sequence[Cell]) -> Cell:
    """The cell to calibrate with: the first whose method scores both views, else the first."""
    return next((cell for cell in cells if cell.method.name not in READS_THE_IMAGE_ONCE), cells[0])


def calibrate(cell: Cell, world: WorldConfig | None) -> Costs:
    """Train a few steps of a cell and answer a few questions, in a temporary folder that is deleted again."""
    with TemporaryDirectory() as folder:
        return _calibrate(cell.config, world, Path(folder))


def _calibrate(config: RunConfig, world: WorldConfig | None, folder: Path) -> Costs:
    rows, questions = config.optim.prompts_per_step, -(-RESPONSES // config.eval.k)
    if world:
        data = write_world(world.model_copy(update={"train": rows, "eval": questions, "test": 2}), folder / "data")
    else:
        data = DataConfig(
            train=_first_rows(config.data.train, rows, folder, "train"),
            eval=_first_rows(config.data.eval or config.data.test, questions, folder, "eval"),
        )
    began = time.perf_counter()
    run = set_up(config.model_copy(update={"run": folder / "run", "data": data, "trackers": ()}), on_check=lambda text: None)
    start = time.perf_counter() - began + time.process_time()
    times = []
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        prompts = [run.renderer(example, run.tools.views) for example in run.train]
        train_step(prompts, step, weighting_of(run.config.method, step), run.tools)
        times.append(time.perf_counter() - began)
    engine = sampler(run.student, run.source, held_out_sampling(run.config, 0), rows=config.rollouts.rows)
    began = time.perf_counter()
    asked = [run.renderer(example) for example in run.held_out]
    answers = answer(engine, asked, [example.answer for example in run.held_out], decoder(run.source), k=config.eval.k)
    sampled, scored = time.perf_counter() - began, 0.0
    if run.teacher:
        began = time.perf_counter()
        teacher_advantages(run.teacher, answers.groups, run.config.deadband)
        scored = time.perf_counter() - began
    responses = len(asked) * config.eval.k
    return Costs(min(times[1:]) / (len(run.train) * run.tools.k), sampled / responses, scored / responses, start)


def _first_rows(source: Path | None, rows: int, folder: Path, name: str) -> Path:
    assert source is not None  # the study refuses data without held-out questions
    return write_examples(read_examples(source)[:rows], folder / name, name)
