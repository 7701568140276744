"""One process of a study: a run, or a baseline's evaluation, and what a study measures beyond them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vaopd.analysis.probe_models import Loaded, load
from vaopd.analysis.view_table import QUESTIONS_AT_ONCE
from vaopd.config import RunConfig
from vaopd.data.render import Renderer
from vaopd.data.sources import read_examples
from vaopd.evaluate.command import evaluate_folder
from vaopd.evaluate.held_out import sampler
from vaopd.rollouts.given import GivenEngine
from vaopd.rollouts.hf import Sampling
from vaopd.train.folder import RunFolder
from vaopd.train.loop import Progress, train
from vaopd.types import DEGRADED, ORIGINAL, Example

DONE, COST = "cell.json", "cost.jsonl"
FIXED_QUESTIONS = 128  # with a picture, one response each
EVALUATION_NOISE = 1  # the seed of a baseline's samples: that of `vaopd evaluate`
HEAVY = ("checkpoints", "model", "adapter", "tensorboard")  # what only further training or use needs


def run_cell(config: RunConfig, responses: Path, *, keep_model: bool, on_check: Callable[[str], None]) -> None:
    """Train, or go on with it, and write `cell.json` last: what is done has one.

    Args:
        responses: the file of the fixed responses; made from the recipe's student where it isn't there.
        keep_model: False: the finished cell keeps its numbers only.
    """
    folder = RunFolder(config.run)
    if not (config.run / "eval.json").exists():
        clock = _Clock(folder)
        train(config, resume=(config.run / "config.yaml").exists(), progress=Progress(on_check=on_check, on_row=clock))
        clock({"kind": "final", "step": 0}, 0)
    measured = image_gap(load([str(config.run / "model")])[0], config, responses)
    folder.write_json(DONE, {"student_va": measured})
    if not keep_model:
        for name in HEAVY:
            shutil.rmtree(config.run / name, ignore_errors=True)


def run_baseline(config: RunConfig, role: str, responses: Path, out: Path) -> None:
    """Evaluate the recipe's untrained student, or its teacher, on the test set; writes its entry of `eval.json` with `student_va`."""
    teacher = config.student if config.self_taught else config.teacher
    model = config.student if role == "student" or teacher is None else teacher
    entry = evaluate_folder(
        model,
        _test_data(config),
        k=config.eval.k,
        teacher=teacher,
        max_tokens=config.rollouts.max_tokens,
        temperature=config.eval.temperature,
        rows=config.rollouts.rows,
        view_config=config.view,
        seed=EVALUATION_NOISE,
        on_progress=lambda done, of: None,
    )
    entry["student_va"] = image_gap(load([model])[0], config, responses)
    out.parent.mkdir(parents=True, exist_ok=True)
    RunFolder(out.parent).write_json(out.name, entry)


@torch.no_grad()
def image_gap(model: Loaded, config: RunConfig, responses: Path) -> float | None:
    """Mean over tokens of log p(y_t | v) - log p(y_t | ṽ) of this model on the fixed responses, nats, signed; None without a token.

    The responses are the same for every model of one initial student, so a difference is the model's, not its answers'.
    """
    given = fixed_responses(config, responses)
    renderer = Renderer(model.source.processor, config.view.make())
    prompts = [renderer(example) for example in _pictured(config) if example.id in given]
    engine = GivenEngine({key: torch.tensor(ids) for key, ids in given.items()}, max_tokens=config.rollouts.max_tokens)
    groups = engine.generate(prompts, 1, 0)
    total, tokens = 0.0, 0
    for start in range(0, len(groups), QUESTIONS_AT_ONCE):
        for score in model.scorer.score(groups[start : start + QUESTIONS_AT_ONCE], (ORIGINAL, DEGRADED)):
            gap_N = (score.logp_N[ORIGINAL] - score.logp_N[DEGRADED]).double()
            total, tokens = total + float(gap_N.sum()), tokens + len(gap_N)
    return total / tokens if tokens else None


def fixed_responses(config: RunConfig, file: Path) -> Mapping[str, list[int]]:
    """Question -> token ids: one response of the untrained student to each of the first test questions with a picture.

    Whoever comes first writes the file. The sampling noise depends on nothing but the question, so it does not matter who that is.
    """
    if not file.exists():
        student = load([config.student])[0]
        renderer = Renderer(student.source.processor, config.view.make())
        sampling = Sampling(config.rollouts.max_tokens, config.eval.temperature, 1.0, EVALUATION_NOISE)
        engine = sampler(student.model, student.source, sampling, rows=config.rollouts.rows)
        groups = engine.generate([renderer(example) for example in _pictured(config)], 1, 0)
        found = {group.prompt.id: group.responses[0].tolist() for group in groups if len(group.responses[0])}
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_name(f".{file.name}.{os.getpid()}")  # two processes may come first
        own.write_text(json.dumps({"student": config.student, "responses": found}) + "\n", encoding="utf-8")
        os.replace(own, file)
    return json.loads(file.read_text(encoding="utf-8"))["responses"]


def _pictured(config: RunConfig) -> list[Example]:
    return [example for example in read_examples(_test_data(config)) if example.images][:FIXED_QUESTIONS]


def _test_data(config: RunConfig) -> Path:
    found = config.data.test or config.data.eval
    assert found is not None  # the study refuses data without both
    return found


class _Clock:
    """Writes what came between the rows of a run to `cost.jsonl`: CPU seconds, since cells side by side slow one another's clocks."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.last = folder, (time.process_time(), time.perf_counter())

    def __call__(self, row: Mapping[str, Any], steps: int) -> None:
        now = time.process_time(), time.perf_counter()
        cpu, wall = (round(after - before, 3) for before, after in zip(self.last, now, strict=True))
        self.folder.append(self.folder.path / COST, {"kind": row["kind"], "step": row["step"], "cpu_seconds": cpu, "seconds": wall})
        self.last = now
