"""The step of the package against the row-by-row baseline: teacher, coefficients, the student's forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vaopd.bench.baseline import DEADBAND, baseline_step, row_by_row
from vaopd.bench.flops import rows_load, shared_load, step_flops
from vaopd.bench.shapes import Plan, Setting, Shape, make_group, make_models
from vaopd.bench.timing import Ratio, Times, over, take_turns
from vaopd.core import OPD, VAOPD, token_coefficients, token_divergence
from vaopd.models.forward import head_of
from vaopd.models.shared_prompt import shared
from vaopd.teachers.local import LocalTeacher
from vaopd.train.step import StudentLoss, advantages, layout
from vaopd.types import DEGRADED, ORIGINAL

# Whose log-probabilities the method reads: OPD, VA-OPD.
NO_VIEWS: tuple[str, ...] = ()
BOTH_VIEWS = (ORIGINAL, DEGRADED)
WHOLE = 10**9  # tokens of a forward: everything at once, as in the baseline


@dataclass(frozen=True)
class StepResult:
    """One shape, equal or ragged lengths."""

    shape: Shape
    ragged: bool
    times: dict[str, Times]
    max_grad_rel_error: float
    arithmetic: float  # floating-point operations of our VA-OPD over those of row-by-row OPD: what the time can come to

    def ratio(self, ours: str, theirs: str) -> Ratio:
        return over(self.times[ours], self.times[theirs])


def package_step(setting: Setting, views: Sequence[str]) -> Tensor:
    """The middle of `vaopd.train.step.train_step`, siblings sharing their prompt. Returns the loss."""
    teacher, student = package_parts(setting)
    setting.student.zero_grad(set_to_none=True)
    scores = teacher.score(setting.groups, views)
    weighting = VAOPD() if DEGRADED in views else OPD()
    a_N = advantages(setting.groups, scores, weighting, DEADBAND)
    c_N = token_coefficients(a_N, *layout(setting.groups), weighting)
    hidden_NG = torch.cat([score.hidden_NG for score in scores])
    loss, _, _ = student(setting.groups, hidden_NG, teacher.head, c_N, float(len(setting.groups)))
    loss.backward()
    return loss.detach()


def package_parts(setting: Setting) -> tuple[LocalTeacher, StudentLoss]:
    """Teacher and loss as a run has them."""
    teacher = LocalTeacher(setting.teacher, vocab_size=setting.vocab, forward=shared, tokens_per_forward=WHOLE)
    return teacher, StudentLoss(setting.student, vocab_size=setting.vocab, forward=shared, loss="reverse_kl")


def step_variants(setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """Both ways of computing, both methods."""
    return {
        "rows opd": lambda: baseline_step(setting, NO_VIEWS),
        "rows va": lambda: baseline_step(setting, BOTH_VIEWS),
        "shared opd": lambda: package_step(setting, NO_VIEWS),
        "shared va": lambda: package_step(setting, BOTH_VIEWS),
    }


def measure_steps(plan: Plan) -> list[StepResult]:
    """All shapes with equal lengths, then all with ragged ones."""
    student, teacher = make_models(plan)
    results = []
    for ragged in (False, True):
        for shape in plan.shapes:
            setting = Setting(student, teacher, (make_group(shape, plan.vocab, ragged=ragged),), plan.vocab)
            times = take_turns(step_variants(setting), plan.rounds)
            results.append(StepResult(shape, ragged, times, gradient_error(setting), arithmetic_ratio(setting)))
    return results


def arithmetic_ratio(setting: Setting) -> float:
    """Floating-point operations of the package's VA-OPD over those of row-by-row OPD, of one group."""
    (group,) = setting.groups
    sizes = len(group.prompt.ids_P), group.lengths, len(group.prompt.images[ORIGINAL]["pixel_values"])
    models = setting.student.config, setting.teacher.config
    ours = step_flops(*models, shared_load(*sizes), views=2, log_probs=True)
    return ours / step_flops(*models, rows_load(*sizes), views=1, log_probs=False)


def measure_scaling(plan: Plan, shape: Shape) -> dict[int, Times]:
    """The package's VA-OPD step with one and with eight siblings."""
    student, teacher = make_models(plan)
    settings = {K: Setting(student, teacher, (make_group(Shape(shape.P, shape.T, K), plan.vocab),), plan.vocab) for K in (1, 8)}
    times = take_turns({str(K): partial(package_step, setting, BOTH_VIEWS) for K, setting in settings.items()}, plan.rounds)
    return {K: times[str(K)] for K in settings}


def scaling_formula(shape: Shape) -> float:
    """Decoder tokens with eight siblings over those with one, `(P + 8T) / (P + T)`."""
    return (shape.P + 8 * shape.T) / (shape.P + shape.T)


def gradient_error(setting: Setting) -> float:
    """Largest difference of a gradient, relative to the largest of its parameter, at fixed coefficients.

    Ours: shared prompts and the fused loss. The reference: one row per rollout, whole logits, autograd. The coefficients are fixed
    because their cut is discontinuous: rounding could put a token on the other side of it.
    """
    groups = setting.groups
    tokens = sum(sum(group.lengths) for group in groups)
    advantages_N = torch.rand(tokens, generator=torch.Generator().manual_seed(0))
    c_N = token_coefficients(advantages_N, *layout(groups), VAOPD())
    ours, theirs = package_gradients(setting, c_N), reference_gradients(setting, c_N)
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def package_gradients(setting: Setting, c_N: Tensor) -> dict[str, Tensor]:
    """By the student's parameters."""
    teacher, student = package_parts(setting)
    setting.student.zero_grad(set_to_none=True)
    hidden_NG = torch.cat([score.hidden_NG for score in teacher.score(setting.groups)])
    student(setting.groups, hidden_NG, teacher.head, c_N, 1.0)[0].backward()
    return _gradients(setting)


def reference_gradients(setting: Setting, c_N: Tensor) -> dict[str, Tensor]:
    """The same row by row, through whole logits."""
    student, teacher, groups = setting.student, setting.teacher, setting.groups
    student.zero_grad(set_to_none=True)
    with torch.no_grad():
        hidden_NG = row_by_row(teacher, groups, ORIGINAL)
    heads = [head_of(model, setting.vocab) for model in (student, teacher)]
    kl_N = token_divergence(row_by_row(student, groups, ORIGINAL), heads[0], hidden_NG, heads[1])
    (c_N * kl_N).sum().backward()
    return _gradients(setting)


def _gradients(setting: Setting) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in setting.student.named_parameters() if parameter.requires_grad}
