"""Methods × students × teachers × data sizes × regimes × seeds, side by side on the cores (docs/own_study.md).

Every cell is a process of its own with a run folder of its own; a study that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from vaopd.analysis.cell import DONE
from vaopd.analysis.forecast import Forecast, calibrate, dearest, forecast, measured_seconds
from vaopd.analysis.matrix import COMPARISON, Cell, Place, comparison_cells, development_cells, read_json, write_data
from vaopd.analysis.results import Row, baseline_row, cell_row, choose_rates, chosen_rates, of_whole_seeds, tables
from vaopd.config import RunConfig, StudyConfig
from vaopd.data.sources import read_examples
from vaopd.errors import ConfigError, DataError, StudyFailed
from vaopd.evaluate.runner import gain
from vaopd.train.card import package_versions
from vaopd.train.folder import RunFolder, read_rows

BASELINES = "baselines"
OnProgress = Callable[[Mapping["Job", str]], None]


@dataclass(frozen=True)
class Job:
    """One process of a study."""

    name: str
    command: tuple[str, ...]
    log: Path
    result: Path  # there when the job is done
    metrics: Path | None = None  # of a training run
    steps: int = 0


@dataclass(frozen=True)
class Baseline:
    """An untrained student or a teacher in one regime."""

    name: str  # of its job and its file; regimes in which nothing differs that it depends on share one
    role: str  # student | teacher
    place: Place
    cell: Cell  # any of those that it is the baseline of


def run_study(study: StudyConfig, *, on_progress: OnProgress, workers: int | None = None) -> dict[str, Any]:
    """Run what is not done yet and write `results.jsonl` and `summary.json`; returns the latter (docs/run_folder.md).

    Both are written after each process; until all are done, `summary.json` compares the seeds that are finished everywhere.

    Where the study names learning rates, all of them run on the development seeds first, and the comparison runs each method at its best.

    Args:
        on_progress: called about twice a second with every job of the phase and its state: waiting, running, done.
        workers: processes side by side; default: `cores()`.

    Raises:
        StudyFailed: with the end of the failing process' output.
        ConfigError: the folder holds results of another recipe or another world.
        DataError: held-out questions have no answers, so that there is nothing to compare.
    """
    began, earlier = time.monotonic(), read_json(study.run / "summary.json").get("seconds", 0)

    def spent() -> int:
        return round(earlier + time.monotonic() - began)

    study.run.mkdir(parents=True, exist_ok=True)
    RunFolder(study.run).write_text("study.yaml", yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    write_data(study)
    _check_answers(study)
    development = development_cells(study)
    rows = _run_phase(study, development, [], on_progress, workers, [])
    selection = choose_rates(rows)
    cells = comparison_cells(study, chosen_rates(selection))
    baselines = _baselines(cells)

    def so_far(rows: Sequence[Row]) -> None:
        compared = of_whole_seeds(_compared(rows), len(cells) // len(study.seeds))
        if study.is_matrix and compared:
            unfinished = {"seeds": len({row["seed"] for row in compared}), "of": len(study.seeds)}
            begun = {"name": study.name, "unfinished": unfinished, "seconds": spent(), **_sizes(compared[0])}
            RunFolder(study.run).write_json("summary.json", begun | _matrix(study, compared, selection))

    rows = _run_phase(study, cells, baselines, on_progress, workers, rows, so_far)
    summary = _summary(study, cells, baselines)
    if study.is_matrix:
        summary |= _matrix(study, _compared(rows), selection)
        summary["cpu_seconds"] = round(sum(row.get("seconds_total", 0) for row in rows))
    RunFolder(study.run).write_json("summary.json", summary | {"seconds": spent()})
    return read_json(study.run / "summary.json")


def cores() -> int:
    """How many processes run side by side: one per core, one in all where there is a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def foresee(study: StudyConfig) -> list[Forecast]:
    """What the study consists of and how long a cell takes. Draws the data; where a kind has no finished cell, times a few steps."""
    write_data(study)
    development = development_cells(study)
    cells = development + comparison_cells(study, {})  # at any rate: no cell takes longer at another one
    count = cache(lambda path: len(read_examples(path)) if path else 0)  # cells share their files
    sizes = {cell.name: (count(data.train), count(data.eval), count(data.test)) for cell in cells for data in (cell.config.data,)}
    unknown = [cell for cell in cells if measured_seconds(cell) is None]
    costs = None
    if unknown:
        chosen = dearest(unknown)
        costs = calibrate(chosen, study.world_of(chosen.place.regime))
    return forecast(cells, sizes, costs)


def plan(study: StudyConfig, cells: Sequence[Cell], baselines: Sequence[Baseline] = ()) -> list[Job]:
    """The processes of one phase, longest first; writes their recipes.

    Raises:
        ConfigError: a cell's folder has results of another recipe.
    """
    for cell in cells:
        if changed := RunFolder(cell.config.run).changed(cell.config):
            raise ConfigError(
                f"{cell.config.run} was made with another recipe: {'; '.join(changed)}. "
                "Its results would be mixed with others: delete the study's folder, or give another: --set run=FOLDER"
            )
    return [_cell_job(study, cell) for cell in cells] + list({b.name: _baseline_job(study, b) for b in baselines}.values())


def _run_phase(
    study: StudyConfig,
    cells: Sequence[Cell],
    baselines: Sequence[Baseline],
    on_progress: OnProgress,
    workers: int | None,
    earlier: Sequence[Row],
    so_far: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Run a phase, and after each finished process write what is known to results.jsonl; returns all rows so far."""
    jobs = plan(study, cells, baselines)
    known: dict[str, Row] = {}

    def write() -> list[Row]:
        for cell in cells:
            if cell.name not in known and (cell.config.run / DONE).exists():
                known[cell.name] = cell_row(cell, study.levels)
        rows = [*earlier, *(known[cell.name] for cell in cells if cell.name in known), *_baseline_rows(study, baselines)]
        RunFolder(study.run).write_text("results.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return rows

    _run_all(jobs, workers or cores(), on_progress, on_done=lambda: so_far(write()))
    return write()


def _cell_job(study: StudyConfig, cell: Cell) -> Job:
    recipe = _write_recipe(study, cell.name, cell.config)
    command = ["cell", str(recipe), "--responses", str(_responses(study, cell)), *(["--numbers-only"] if study.keep == "numbers" else [])]
    log = study.run / "logs" / f"{cell.name}.log"
    return Job(cell.name, tuple(command), log, cell.config.run / DONE, cell.config.run / "metrics.jsonl", cell.config.optim.steps or 0)


def _baseline_job(study: StudyConfig, baseline: Baseline) -> Job:
    recipe = _write_recipe(study, baseline.name, baseline.cell.config)
    out = study.run / BASELINES / f"{baseline.name}.json"
    command = ("cell", str(recipe), "--responses", str(_responses(study, baseline.cell)), "--baseline", baseline.role, "--out", str(out))
    return Job(baseline.name, command, study.run / "logs" / f"{baseline.name}.log", out)


def _write_recipe(study: StudyConfig, name: str, config: RunConfig) -> Path:
    recipe = study.run / "recipes" / f"{name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return recipe


def _responses(study: StudyConfig, cell: Cell) -> Path:
    """The fixed responses of one initial student in one regime."""
    development = [] if cell.phase == COMPARISON else [cell.phase]
    return (
        study.run
        / BASELINES
        / ("-".join(["responses", *development, *Place(cell.place.regime, cell.place.student, None, None).parts]) + ".json")
    )


def _baselines(cells: Sequence[Cell]) -> list[Baseline]:
    """Every regime's untrained students, scored by its first teacher, and its teachers, on its first student's answers: none depends
    on the method, the seed or the data that is trained on.
    """
    found: dict[tuple[str, Place], Baseline] = {}
    named: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        place, config = cell.place, cell.config
        roles = {"student": Place(place.regime, place.student, None, None)}
        roles |= {"teacher": Place(place.regime, None, place.teacher, None)} if config.teacher and not config.self_taught else {}
        for role, own in roles.items():
            if (role, own) not in found:
                name = "-".join([role, *own.parts])
                found[role, own] = Baseline(named.setdefault(_evaluated(role, config), name), role, own, cell)
    return list(found.values())


def _evaluated(role: str, config: RunConfig) -> tuple[Any, ...]:
    """Everything that a baseline's numbers depend on."""
    models = (config.student, config.teacher)
    return (
        role,
        *models,
        config.data.test,
        config.data.eval,
        tuple(config.view.to_options()),
        config.rollouts.max_tokens,
        config.rollouts.rows,
        config.eval.k,
        config.eval.temperature,
    )


def _baseline_rows(study: StudyConfig, baselines: Sequence[Baseline]) -> list[Row]:
    found = []
    for baseline in baselines:
        if entry := read_json(study.run / BASELINES / f"{baseline.name}.json"):
            found.append(baseline_row(baseline.name, baseline.role, baseline.place, baseline.cell.student, baseline.cell.teacher, entry))
    return found


def _check_answers(study: StudyConfig) -> None:
    """Where cells are compared by accuracy, or chosen by it. Raises DataError."""
    if not study.is_matrix or study.world:
        return
    for regime in study.regimes or (None,):
        data = study.recipe_of(regime, next(iter(study.students), None), next(iter(study.teachers), None))["data"]
        for name in ("eval", "test"):
            missing = [example.id for example in read_examples(data[name]) if example.answer is None] if data.get(name) else []
            if missing:
                raise DataError(
                    f"a study compares accuracies, but {len(missing)} rows of {data[name]} have no answer, the first is '{missing[0]}'. "
                    "Add the field 'answer' to them"
                )


def _run_all(jobs: Sequence[Job], workers: int, on_progress: OnProgress, on_done: Callable[[], None]) -> None:
    waiting = [job for job in jobs if not job.result.exists()]
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[job.name] = job, _start(job)
            time.sleep(0.4)
            for name, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _check(job, process.returncode)
                    on_done()
            on_progress({job: _state(job, running, waiting) for job in jobs})
    finally:
        for _, process in running.values():
            process.terminate()
            process.wait()


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.result.parent.mkdir(parents=True, exist_ok=True)
    # torch's threads of several processes wait for one another by spinning, so each cell gets one.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with job.log.open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "vaopd", *job.command], stdout=log, stderr=subprocess.STDOUT, env=environment)


def _check(job: Job, code: int) -> None:
    if code != 0 or not job.result.exists():
        lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise StudyFailed(
            f"'{job.name}' ended with exit code {code}; the same command goes on with the study when the cause is mended. "
            f"The end of {job.log}:\n" + "\n".join(lines[-8:])
        )


def _state(job: Job, running: Mapping[str, Any], waiting: Sequence[Job]) -> str:
    return "running" if job.name in running else "waiting" if job in waiting else "done"


def _summary(study: StudyConfig, cells: Sequence[Cell], baselines: Sequence[Baseline]) -> dict[str, Any]:
    """Fill the baselines into every cell's eval.json and put all models side by side."""
    found = {(b.role, b.place): read_json(study.run / BASELINES / f"{b.name}.json") for b in baselines}
    first = found[baselines[0].role, baselines[0].place]
    gains, trained = {}, {}
    for cell in cells:
        place, name = cell.place, cell.name
        evaluation = read_json(cell.config.run / "eval.json")
        own = {"student": found["student", Place(place.regime, place.student, None, None)]}
        if teacher := found.get(("teacher", Place(place.regime, None, place.teacher, None))):
            own["teacher"] = teacher
        trained[name] = evaluation["models"]["trained"]
        gains[name] = _gain(own["student"], trained[name])
        models = {role: _entry(entry) for role, entry in own.items()} | {"trained": trained[name]}
        evaluation |= {"models": models, "gain": gains[name], "mass_curve": own["student"].get("mass_curve")}
        RunFolder(cell.config.run).write_json("eval.json", evaluation)
    named = {b.name: _entry(found[b.role, b.place]) for b in baselines}
    models = {name: entry for name, entry in named.items() if name.startswith("student")} | trained | named
    models = {name: {key: value for key, value in entry.items() if key != "per_question"} for name, entry in models.items()}
    return {"name": study.name, **_sizes(first), "models": models, "gains": gains, "mass_curve": first.get("mass_curve")}


def _compared(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("phase") == COMPARISON]


def _matrix(study: StudyConfig, compared: Sequence[Row], selection: Sequence[Row]) -> dict[str, Any]:
    """What summary.json has of a study in which more than the method varies."""
    return {
        "versions": package_versions(),
        "study": _axes(study),
        "selection": list(selection),
        **tables(compared, str(study.baseline_method)),
    }


def _sizes(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {key: measured[key] for key in ("questions", "k")}


def _entry(measured: Mapping[str, Any]) -> dict[str, Any]:
    """A baseline's file as an entry of eval.json."""
    return {key: value for key, value in measured.items() if key not in ("questions", "k", "mass_curve", "student_va")}


def _axes(study: StudyConfig) -> dict[str, Any]:
    """What varied, for the report."""
    return {
        "methods": [str(method) for method in study.methods],
        "seeds": list(study.seeds),
        "students": study.students,
        "teachers": study.teachers,
        "train_sizes": list(study.train_sizes),
        "regimes": {name: regime.model_dump(mode="json") for name, regime in study.regimes.items()},
        "learning_rates": study.model_dump(mode="json")["learning_rates"],
        "development_seeds": list(study.development_seeds),
        "world": study.world.model_dump(mode="json") if study.world else None,
        "recipe": study.recipe,
    }


def _gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float] | None:
    if not before.get("per_question") or not after.get("per_question"):
        return None
    return gain(torch.tensor(before["per_question"]), torch.tensor(after["per_question"]))


def checks(job: Job) -> list[str]:
    """What a running job has said about its checks so far."""
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines() if job.log.exists() else []
    return [line.rstrip() for line in lines if line.startswith("checks ")]


def training_rows(job: Job) -> list[dict[str, Any]]:
    """The steps of a training job so far."""
    return read_rows(job.metrics, lambda row: row.get("kind") == "train") if job.metrics else []
