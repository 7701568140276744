"""A whole run: step, evaluate, checkpoint, in a folder that can be resumed to the bit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vaopd.config import RunConfig
from vaopd.errors import CheckpointError, TrainingStopped
from vaopd.models.export import export_model
from vaopd.models.lora import adapters, save_adapter
from vaopd.train import checkpoint, trackers
from vaopd.train.card import write_card
from vaopd.train.evaluation import better, evaluate_step, final_evaluation
from vaopd.train.folder import ACCOUNT, RunFolder
from vaopd.train.health import gap_warning, noise_floor, noise_warning, peak_memory, truncation_warning
from vaopd.train.metrics import Metrics
from vaopd.train.prompts import PromptsAhead
from vaopd.train.schedule import learning_rate
from vaopd.train.setup import Run, set_up, weighting_of
from vaopd.train.step import drop_empty, train_step
from vaopd.types import DEGRADED, ORIGINAL

log = logging.getLogger(__name__)

STOP_AFTER = 3  # non-finite steps in a row


@dataclass(frozen=True)
class Progress:
    """What a run tells whoever watches it; every hook is optional."""

    on_check: Callable[[str], None] = lambda text: None  # a line about what was checked
    on_row: Callable[[Metrics, int], None] = lambda row, steps: None  # each row of metrics.jsonl, and the number of steps
    on_peak: Callable[[float], None] = lambda mebibytes: None  # the most memory that training took, in MiB
    on_final: Callable[[str, int, int], None] = lambda model, done, of: None  # the final evaluation goes on


def train(config: RunConfig, *, resume: bool = False, progress: Progress | None = None) -> Path:
    """Run the recipe and return its run folder (docs/run_folder.md).

    Args:
        resume: go on from the newest whole checkpoint; the result equals an uninterrupted run to the bit (fp32, one machine).

    Raises:
        ConfigError, DataError, ModelError: something in the recipe can't work; nothing was trained.
        CheckpointError: the folder has a run already, there is none to resume or it had another recipe, no checkpoint is whole, or another
            process is writing to it.
        TrainingStopped: three steps in a row were not finite.
    """
    progress = progress or Progress()
    RunFolder(config.run).check(config, resume=resume)
    run = set_up(config, on_check=progress.on_check)
    if not run.folder.writes:
        progress = Progress()  # one of several processes tells
    with run.folder.claimed():
        start = _resume(run) if resume else _start(run)
        run.tools.accelerator.wait_for_everyone()  # before what all have read is changed
        run.folder.write_json(ACCOUNT, run.account)
        _measure_noise(run, progress)
        with trackers.tracked(run.tools.accelerator, run.folder) as places:
            for place in places:
                progress.on_check(place)
            _go_on(run, start, progress)
            progress.on_peak(peak_memory(run.student.device))
            if run.folder.writes:
                _finish(run, progress)
    return run.folder.path


def _go_on(run: Run, start: int, progress: Progress) -> None:
    """The steps after `start`, -1 for a run that has not been evaluated yet."""
    config = run.config
    if start < 0:
        _evaluate(run, 0, progress)
    with ThreadPoolExecutor(1) as thread:
        ahead = PromptsAhead(run, thread)
        for step in range(max(start, 0) + 1, run.steps + 1):
            row = _one_step(run, step, ahead)
            _record(run, row, progress)
            _warn_of_truncation(run, row)
            _warn_of_gap(run, row)
            _stop_if_sick(run, row)
            if step % config.eval.every == 0 or step == run.steps:
                _evaluate(run, step, progress)
            elif step % (config.checkpoint.every or config.eval.every) == 0:
                _save(run, step)


def _start(run: Run) -> int:
    run.folder.start(run.config.to_yaml())
    return -1


def _resume(run: Run) -> int:
    """Restore the newest whole checkpoint and forget what was written after it; returns its step, -1 where there is none yet."""
    found = checkpoint.load_latest(run.folder.checkpoints)
    if found is None:
        run.folder.rewind(-1)
        return -1
    if found.state.get("frozen") != run.state["frozen"]:
        raise CheckpointError(
            f"checkpoint {found.path} was trained beside other frozen weights than {run.source.name} has now. "
            "Put the model back as it was, or start another run: --set run=FOLDER"
        )
    checkpoint.restore(found, run.student, run.tools.optimizer)
    step = found.state.pop("step")
    run.state = found.state
    run.folder.rewind(step)
    if run.folder.writes and run.state["best"] and run.state["best"]["step"] == step:  # a kill may have come before this pointer
        checkpoint.point(run.folder.checkpoints, checkpoint.BEST, found.path.name)
    log.info("resumed from step %d", step)
    return step


def _measure_noise(run: Run, progress: Progress) -> None:
    """Where the degraded view is scored: how exact the scores are, against the deadband."""
    if run.tools.teacher is None or DEGRADED not in run.tools.views:
        return
    prompts = [run.renderer(example, (ORIGINAL,)) for example in run.train[:2]]
    groups = drop_empty(run.tools.engine.generate(prompts, run.tools.k, 0))
    floor = noise_floor(run.tools.teacher, groups)
    progress.on_check(f"scores equal in two batch shapes to {floor:.1g} nats, deadband {run.config.deadband:g}")
    if warning := noise_warning(floor, run.config.deadband):
        log.warning("%s", warning)


def _warn_of_truncation(run: Run, row: Metrics) -> None:
    if not run.warned_of_truncation and (warning := truncation_warning(row, run.config.rollouts.max_tokens)):
        run.warned_of_truncation = True
        log.warning("%s", warning)


def _warn_of_gap(run: Run, row: Metrics) -> None:
    if not run.warned_of_gap and (warning := gap_warning(row)):
        run.warned_of_gap = True
        log.warning("%s", warning)


def _one_step(run: Run, step: int, ahead: PromptsAhead) -> Metrics:
    began = time.perf_counter()
    rate = learning_rate(run.config.optim, step, run.steps)
    for group in run.tools.optimizer.param_groups:
        group["lr"] = rate
    with ahead.during(step) as prompts:
        metrics = train_step(prompts, step, weighting_of(run.config.method, step), run.tools)
    return {"kind": "train", "step": step, **metrics, "lr": rate, "seconds": round(time.perf_counter() - began, 3)}


def _stop_if_sick(run: Run, row: Metrics) -> None:
    run.state["nonfinite_streak"] = run.state["nonfinite_streak"] + 1 if row["nonfinite"] else 0
    if run.state["nonfinite_streak"] >= STOP_AFTER:
        raise TrainingStopped(
            f"{STOP_AFTER} steps in a row, up to step {row['step']}, had a score, loss or gradient that is not finite; none of them "
            "changed the weights. Lower optim.lr or use precision: fp32, and go on with --resume"
        )


def _record(run: Run, row: Metrics, progress: Progress) -> None:
    run.folder.append(run.folder.metrics, row)
    progress.on_row(row, run.steps)
    trackers.log_metrics(run.tools.accelerator, row)


def _evaluate(run: Run, step: int, progress: Progress) -> None:
    """Evaluate on the held-out questions, save, and make this checkpoint the best where it is."""
    best = run.state["best"]
    if run.held_out:
        row, samples = evaluate_step(run, step)
        _record(run, row, progress)
        for sample in samples:
            run.folder.append(run.folder.samples, sample)
        trackers.log_samples(run.tools.accelerator, step, samples)
        if best is None or better(row, best):
            run.state["best"] = {"step": step, "accuracy": row["accuracy"], "kl": row["kl"]}
    else:  # nothing to choose by: the last is the best
        run.state["best"] = {"step": step, "accuracy": None, "kl": None}
    _save(run, step)


def _save(run: Run, step: int) -> None:
    """By the process that writes; the others hold the same weights and wait, so that a kill finds all of them at one step."""
    if run.folder.writes:
        folder = run.folder.checkpoints
        path = checkpoint.save(folder, step, run.student, run.tools.optimizer, run.state)
        if run.state["best"] and run.state["best"]["step"] == step:
            checkpoint.point(folder, checkpoint.BEST, path.name)
        checkpoint.retain(folder, run.config.checkpoint.keep, path)
    run.tools.accelerator.wait_for_everyone()


def _finish(run: Run, progress: Progress) -> None:
    """The best weights as a model folder, and the final evaluation of them."""
    best = checkpoint.named(run.folder.checkpoints, checkpoint.BEST)
    if best is None:
        raise CheckpointError(f"{run.folder.checkpoints} names no best checkpoint. Go on with --resume")
    checkpoint.restore(checkpoint.load(best), run.student, run.tools.optimizer)
    export = export_model(run.student, run.source, run.folder.path / "model")
    if adapters(run.student):
        save_adapter(run.student, run.folder.path / "adapter", base=run.config.student)
    result = final_evaluation(run, progress.on_final) if run.test else None
    if result:
        run.folder.write_json("eval.json", result)
    write_card(run, export, result)
