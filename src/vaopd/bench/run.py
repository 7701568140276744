"""The benchmark from beginning to end."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from vaopd.bench.loss import measure_losses, measure_memory
from vaopd.bench.results import Results, Scaling, to_json
from vaopd.bench.rollout import measure_rollouts
from vaopd.bench.shapes import LEAST_PROMPT, Plan, Shape
from vaopd.bench.step import measure_scaling, measure_steps
from vaopd.bench.trainer import measure_trainers
from vaopd.bench.work import measure_work
from vaopd.errors import ConfigError
from vaopd.train.card import package_versions

PACKAGES = ("vaopd", "torch", "transformers", "accelerate", "trl", "liger-kernel", "datasets")
LEAST_ROUNDS = 5


def make_plan(p: int | None, t: int | None, k: int | None, v: int | None, rounds: int) -> Plan:
    """The default plan, or one with the shape and vocabulary that were asked for. Raises ConfigError for sizes that cannot be."""
    plan = Plan()
    _at_least("--p", p, LEAST_PROMPT)
    _at_least("--t", t, 2)
    _at_least("--k", k, 1)
    _at_least("--v", v, 1024)
    _at_least("--rounds", rounds, 1)
    shapes = tuple(Shape(shape.P, shape.T, k or shape.K) for shape in plan.shapes)
    if p is not None or t is not None:
        shapes = (Shape(p or shapes[0].P, t or shapes[0].T, shapes[0].K),)
    losses = plan.losses if v is None else ((plan.losses[0][0], v),)
    return Plan(shapes=shapes, vocab=v or plan.vocab, losses=losses, rounds=rounds)


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{option} must be at least {least}, but is {value}")


def run_bench(plan: Plan, on_part: Callable[[str], None] = lambda _: None) -> Results:
    """Everything, on one thread."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        on_part("work counts")
        work = measure_work(plan)
        on_part("steps")
        steps = measure_steps(plan)
        on_part("siblings")
        scaling = Scaling(plan.shapes[0], measure_scaling(plan, plan.shapes[0]))
        on_part("rollouts")
        rollout = measure_rollouts(plan)
        on_part("whole training steps")
        trainer = measure_trainers(plan)
        losses = measure_losses(plan, on_part)
        on_part("memory of the loss")
        return Results(plan, work, steps, losses, measure_memory(plan), rollout, trainer, scaling)
    finally:
        torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads used": 1,
        "system": f"{platform.system()} {platform.machine()}",
        **package_versions(PACKAGES),
    }


def _processor() -> str:
    """Its name, and the widest vector instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def write_json(results: Results, path: Path) -> None:
    """The ratios alone, under fixed keys."""
    _write(path, to_json(results))


def write_details(results: Results, path: Path) -> None:
    """Hardware, versions, and every round of every variant."""
    _write(path, {"machine": machine(), "ratios": to_json(results), "measured": _plain(results)})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _plain(x: Any) -> Any:
    """Records as dictionaries, seconds with three digits."""
    if is_dataclass(x) and not isinstance(x, type):
        return _plain(asdict(x))
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x
