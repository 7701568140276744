"""Several runs from one student, side by side on the cores: the same prompts and budget, only method and seed differ.

Every cell is a process of its own (`vaopd train`) with a run folder of its own; a study that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vaopd.config import RunConfig, StudyConfig, parse_config
from vaopd.errors import ConfigError, VaopdError
from vaopd.evaluate.runner import gain
from vaopd.train.folder import RunFolder, read_rows
from vaopd.world.data import write_world

BASELINES = "baselines"


@dataclass(frozen=True)
class Job:
    """One process of a study."""

    name: str
    command: tuple[str, ...]
    log: Path
    result: Path  # there when the job is done
    metrics: Path | None = None  # of a training run
    steps: int = 0


class StudyFailed(VaopdError):
    """A process of the study ended with an error."""

    exit_code = 7


def run_study(study: StudyConfig, *, on_progress: Callable[[Mapping[Job, str]], None], workers: int | None = None) -> dict[str, Any]:
    """Run what is not done yet and write `summary.json`; returns it (docs/run_folder.md).

    Args:
        on_progress: called about twice a second with every job and its state: waiting, running, done.
        workers: processes side by side; default: one per core, one in all where there is a GPU.

    Raises:
        StudyFailed: with the end of the failing process' output.
    """
    began = time.monotonic()
    jobs, cells = plan(study)
    _run_all(jobs, workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1), on_progress)
    summary = _summary(study, cells)
    earlier = _read_json(study.run / "summary.json").get("seconds", 0) if (study.run / "summary.json").exists() else 0
    RunFolder(study.run).write_json("summary.json", summary | {"seconds": round(earlier + time.monotonic() - began)})
    return _read_json(study.run / "summary.json")


def plan(study: StudyConfig) -> tuple[list[Job], dict[str, RunConfig]]:
    """The study's processes, longest first, and the recipe of every cell; writes data and recipes."""
    study.run.mkdir(parents=True, exist_ok=True)
    data = {"data": write_world(study.world, study.run / "data").model_dump(mode="json")} if study.world else {}
    cells = {}
    for method in study.methods:
        for seed in study.seeds:
            name = _cell_name(study, str(method), seed)
            values = {**study.recipe, **data, "run": str(study.run / name), "method": method.model_dump(), "seed": seed}
            values["eval"] = {**values.get("eval", {}), "baselines": False}
            cells[name] = parse_config(values, where=f"cell {name}")
            if changed := RunFolder(cells[name].run).changed(cells[name]):
                raise ConfigError(
                    f"{cells[name].run} was made with another recipe: {'; '.join(changed)}. "
                    "Its results would be mixed with others: delete the study's folder, or give another: --set run=FOLDER"
                )
    jobs = [_train_job(study, name, config) for name, config in cells.items()]
    return jobs + _baseline_jobs(study, next(iter(cells.values()))), cells


def _cell_name(study: StudyConfig, method: str, seed: int) -> str:
    plain = "".join(c if c.isalnum() or c in "._=-" else "_" for c in method.replace("(", "-").replace(", ", "-").rstrip(")"))
    return plain if len(study.seeds) == 1 else f"{plain}-seed{seed}"


def _train_job(study: StudyConfig, name: str, config: RunConfig) -> Job:
    recipe = study.run / "recipes" / f"{name}.yaml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    command = ["train", str(recipe), "--no-report"] + (["--resume"] if (config.run / "config.yaml").exists() else [])
    log = study.run / "logs" / f"{name}.log"
    return Job(name, tuple(command), log, config.run / "eval.json", config.run / "metrics.jsonl", config.optim.steps or 0)


def _baseline_jobs(study: StudyConfig, config: RunConfig) -> list[Job]:
    """The untrained student and the teacher, evaluated once for all cells."""
    models = {"student": config.student} | ({"teacher": config.teacher} if config.teacher else {})
    return [_evaluate_job(study, config, name, model) for name, model in models.items()]


def _evaluate_job(study: StudyConfig, config: RunConfig, name: str, model: str) -> Job:
    out = study.run / BASELINES / f"{name}.json"
    command = ["evaluate", model, "--data", str(config.data.test or config.data.eval), "--k", str(config.eval.k), "--out", str(out)]
    command += ["--max-tokens", str(config.rollouts.max_tokens), "--temperature", str(config.eval.temperature)]
    command += ["--rows", str(config.rollouts.rows), *config.view.to_options()]
    command += ["--teacher", config.teacher] if config.teacher else []
    return Job(name, tuple(command), study.run / "logs" / f"{name}.log", out)


def _run_all(jobs: Sequence[Job], workers: int, on_progress: Callable[[Mapping[Job, str]], None]) -> None:
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
            on_progress({job: _state(job, running, waiting) for job in jobs})
    finally:
        for _, process in running.values():
            process.terminate()
            process.wait()


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(exist_ok=True)
    job.result.parent.mkdir(exist_ok=True)
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


def _summary(study: StudyConfig, cells: Mapping[str, RunConfig]) -> dict[str, Any]:
    """Fill the baselines into every cell's eval.json and put all models side by side."""
    baselines = {path.stem: _read_json(path) for path in sorted((study.run / BASELINES).glob("*.json"))}
    questions, k = baselines["student"].pop("questions"), baselines["student"].pop("k")
    baselines.get("teacher", {}).pop("questions", None), baselines.get("teacher", {}).pop("k", None)
    curve = baselines["student"].pop("mass_curve", None)
    baselines.get("teacher", {}).pop("mass_curve", None)
    gains, trained = {}, {}
    for name, config in cells.items():
        evaluation = _read_json(config.run / "eval.json")
        trained[name] = evaluation["models"]["trained"]
        gains[name] = _gain(baselines["student"], trained[name])
        evaluation |= {"models": baselines | {"trained": trained[name]}, "gain": gains[name], "mass_curve": curve}
        RunFolder(config.run).write_json("eval.json", evaluation)
    models = {"student": baselines["student"], **trained} | {name: entry for name, entry in baselines.items() if name == "teacher"}
    return {"name": study.name, "questions": questions, "k": k, "models": models, "gains": gains, "mass_curve": curve}


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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
