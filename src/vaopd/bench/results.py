"""One run's results: as JSON, and against the bars that the project sets itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vaopd.bench.loss import LossResult, MemoryResult
from vaopd.bench.rollout import RolloutResult
from vaopd.bench.shapes import Plan, Shape
from vaopd.bench.step import StepResult, scaling_formula
from vaopd.bench.timing import Ratio, Times, over
from vaopd.bench.trainer import TrainerResult
from vaopd.bench.work import WorkResult

GRADIENT_BAR = 1e-5
STEP_BARS = {(312, 48): 0.45, (112, 64): 0.75, (112, 256): 1.05}  # shared VA-OPD over row-by-row OPD
MEMORY_BARS = {(1024, 32_768): 0.13, (512, 151_936): 0.17}  # of the fused loss over whole logits
TIME_BARS = {"materialised": 0.85, "trl": 0.65, "liger": 1.05}  # of the fused loss over others


@dataclass(frozen=True)
class Scaling:
    """The package's VA-OPD step by its number of siblings."""

    shape: Shape
    times: dict[int, Times]

    @property
    def ratio(self) -> Ratio:
        return over(self.times[8], self.times[1])


@dataclass(frozen=True)
class Results:
    """Everything that one run measured."""

    plan: Plan
    work: list[WorkResult]  # equal lengths first
    steps: list[StepResult]
    losses: list[LossResult]
    memory: list[MemoryResult]
    rollout: RolloutResult
    trainer: TrainerResult | None  # None: TRL is not installed
    scaling: Scaling


@dataclass(frozen=True)
class Bar:
    """A number and what it should be at most."""

    name: str
    value: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.value <= self.at_most


def to_json(results: Results) -> dict[str, Any]:
    """The ratios of the fastest rounds, lengths equal; None where a peer is not installed."""
    trainer = results.trainer
    return {
        "work": _work(results.work),
        "step": [_step(step) for step in results.steps if not step.ragged],
        "loss": [_loss(loss) for loss in results.losses],
        "rollout": {
            "prefill_tokens_ratio": _rounded(results.rollout.prefill_ratio),
            "speed_over_generate": _rounded(results.rollout.speed.least),
        },
        "trainer": {
            "opd_step_over_trl": _rounded(trainer.over_trl("opd").least if trainer else None),
            "va_step_over_trl_opd": _rounded(trainer.over_trl("va").least if trainer else None),
        },
        "scaling": {
            "k8_over_k1": _rounded(results.scaling.ratio.least),
            "k8_over_k1_formula": _rounded(scaling_formula(results.scaling.shape)),
        },
    }


def _work(work: list[WorkResult]) -> dict[str, Any]:
    shared, rows = work[0].shared, work[0].rows
    return {
        "decoder_tokens_ratio": _rounded(shared.decoder_tokens / rows.decoder_tokens),
        "head_rows_ratio": _rounded(shared.head_rows / rows.head_rows),
        "vision_runs_ratio": _rounded(shared.vision_runs / rows.vision_runs),
        "matches_formula": all(result.matches_formula for result in work),
    }


def _step(step: StepResult) -> dict[str, Any]:
    return {
        "P": step.shape.P,
        "T": step.shape.T,
        "K": step.shape.K,
        "shared_va_over_rows_opd": _rounded(step.ratio("shared va", "rows opd").least),
        "shared_va_over_shared_opd": _rounded(step.ratio("shared va", "shared opd").least),
        "rows_va_over_rows_opd": _rounded(step.ratio("rows va", "rows opd").least),
        "max_grad_rel_error": _rounded(step.max_grad_rel_error),
    }


def _loss(loss: LossResult) -> dict[str, Any]:
    times = {f"time_over_{name}": loss.time_over(name) for name in TIME_BARS}
    return {
        "N": loss.N,
        "V": loss.V,
        "memory_over_materialised": _rounded(loss.memory_over("materialised")),
        **{key: _rounded(ratio.least if ratio else None) for key, ratio in times.items()},
    }


def _rounded(x: float | None) -> float | None:
    """Four significant digits."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.4g}")


def bars(results: Results) -> Iterator[Bar]:
    """Every bar that this run's shapes have one for; ratios of the fastest rounds."""
    for step in results.steps:
        name = f"P={step.shape.P} T={step.shape.T}{' ragged' if step.ragged else ''}"
        if (bar := STEP_BARS.get((step.shape.P, step.shape.T))) is not None and not step.ragged:
            yield Bar(f"step {name}: VA-OPD / row-by-row OPD", step.ratio("shared va", "rows opd").least, bar)
        yield Bar(f"step {name}: gradient error", step.max_grad_rel_error, GRADIENT_BAR)
    for loss in results.losses:
        name = f"N={loss.N} V={loss.V}"
        memory = loss.memory_over("materialised")
        if memory is not None and (bar := MEMORY_BARS.get((loss.N, loss.V))) is not None:
            yield Bar(f"loss {name}: memory / whole logits", memory, bar)
        for kernel, at_most in TIME_BARS.items():
            if (ratio := loss.time_over(kernel)) is not None:
                yield Bar(f"loss {name}: time / {kernel}", ratio.least, at_most)
