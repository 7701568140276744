"""What each weighting's gradient is made of, how noisy it is, and whether it points to more right answers.

The gradient of a weighting is linear in its coefficients, so it is measured in parts: the tokens of one class (`probes.token_class`) and
one direction of the teacher's difference. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from vaopd.analysis.probes import CLASSES
from vaopd.config import MethodConfig
from vaopd.core import OPD, VAOPD, Head, RolloutOnly, TokenOnly, Weighting, token_coefficients, token_log_probs
from vaopd.core import fused_weighted_divergence as divergence
from vaopd.errors import ConfigError, DataError
from vaopd.teachers.local import LocalTeacher
from vaopd.train.setup import weighting_of
from vaopd.train.step import advantages, layout
from vaopd.types import DEGRADED, ORIGINAL, Group, Teacher

WEIGHTINGS: Mapping[str, Weighting] = {
    "opd": OPD(),
    "va_opd": VAOPD(),
    "token_only": TokenOnly(),
    "rollout_only": RolloutOnly(),
    "token_only(absolute=True)": TokenOnly(absolute=True),
    "va_opd(absolute=True)": VAOPD(absolute=True),
}
DIRECTIONS = ("towards", "against", "unmoved")  # seeing the image makes the teacher score the token higher, lower, neither
MOVED = 0.5  # nats between the teacher's two scores from which a token counts as moved
BATCHES = 8


def weightings_of(methods: Sequence[MethodConfig]) -> dict[str, Weighting]:
    """`WEIGHTINGS` and those of the methods, by name. Raises ConfigError for one that has none, or whose numbers it refuses."""
    for method in methods:
        if method.off_policy:
            raise ConfigError(
                f"'{method.name}' learns from the data's solutions, and the probe has the student's own responses. Leave it out"
            )
    return dict(WEIGHTINGS) | {str(method): weighting_of(method, 0) for method in methods}


@dataclass(frozen=True)
class _Batch:
    """One batch's gradients, flat vectors over all parameters."""

    total: dict[str, Tensor]  # weighting -> gradient
    shares: dict[str, dict[tuple[str, str], float]]  # weighting -> (class, direction) -> inner product of the part and the total
    accuracy: Tensor | None


def check_questions(count: int, which: str) -> None:
    """Raises DataError where there are fewer than batches."""
    if count < BATCHES:
        raise DataError(f"--gradients compares {BATCHES} batches of questions, but only {count} {which}. Give more, or leave it out")


def gradient_probe(
    student: LocalTeacher,
    teacher: Teacher,
    groups: Sequence[Group],
    classes: Sequence[str],
    right: Sequence[Sequence[float]] | None,
    *,
    deadband: float,
    weightings: Mapping[str, Weighting] = WEIGHTINGS,
    batches: int | None = None,
) -> dict[str, Any]:
    """The gradient of every weighting on these responses.

    Args:
        student: gradients of its model are taken; the parameters stay as they are.
        groups: the student's responses, every one with a token.
        classes: `token_class` of every token, in order.
        right: for each group, whether each response is right; None: no answers are known.
        weightings: by name; `opd` must be among them, since the others are compared with it.
        batches: the groups are split into so many (8), whose differences are the noise. At least 2; all but a rest of the groups are used.

    Returns:
        weighting -> `norm`; `signal`, the part of a batch's squared norm that other batches agree on (1: no noise); `cosine_opd` with the
        gradient of OPD and `cosine_accuracy` of its descent with the gradient of the expected accuracy, both without the noise, so that
        little data may give more than 1; and by `classes` and by `directions` the share of the squared norm (sums to 1; negative: that
        part pulls the other way). Entries are None where the noise, or a student that equals its teacher, leaves nothing to divide by.

    Raises:
        ValueError: fewer groups than batches, or fewer than two batches.
    """
    batches = batches or BATCHES
    size = len(groups) // batches
    if batches < 2 or not size:
        raise ValueError(
            f"noise is the difference between batches, so two or more are needed, with a group each; found {len(groups)} groups"
        )
    model, parameters = student.model, list(student.model.parameters())
    before = [p.requires_grad for p in parameters]
    model.requires_grad_(True)
    try:
        measured, start = [], 0
        for index in range(batches):
            part = slice(index * size, (index + 1) * size)
            tokens = sum(sum(group.lengths) for group in groups[part])
            own = classes[start : start + tokens]
            measured.append(_measure(student, teacher, weightings, groups[part], own, right[part] if right else None, deadband))
            start += tokens
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.requires_grad_(grad)
    return {name: _summary(measured, name) for name in weightings}


def _measure(
    student: LocalTeacher,
    teacher: Teacher,
    weightings: Mapping[str, Weighting],
    groups: Sequence[Group],
    classes: Sequence[str],
    right: Sequence[Sequence[float]] | None,
    deadband: float,
) -> _Batch:
    scores = teacher.score(groups, (ORIGINAL, DEGRADED))
    original_N, degraded_N = (torch.cat([score.logp_N[view] for score in scores]) for view in (ORIGINAL, DEGRADED))
    hidden_NG = torch.cat([score.hidden_NG for score in scores])
    rollout_N, group_R = layout(groups)
    model, head = student.model, student.head
    hidden_NH = student.forward(model, groups, ORIGINAL)
    parts = _parts(classes, (original_N - degraded_N).cpu())
    total, shares = {}, {}
    for name, weighting in weightings.items():
        c_N = token_coefficients(advantages(groups, scores, weighting, deadband), rollout_N, group_R, weighting)
        pieces = {
            part: _gradient(model, _loss(hidden_NH, head, hidden_NG, teacher.head, c_N * member_N.to(c_N), len(groups)))
            for part, member_N in parts.items()
        }
        total[name] = torch.stack(list(pieces.values())).sum(0)
        shares[name] = {part: float(piece @ total[name]) for part, piece in pieces.items()}
    return _Batch(total, shares, None if right is None else _accuracy_gradient(model, hidden_NH, head, groups, right))


def _parts(classes: Sequence[str], moved_N: Tensor) -> dict[tuple[str, str], Tensor]:
    """(class, direction) -> (N,) bool; those that occur. Every token is in one."""
    of_N = {"towards": moved_N > MOVED, "against": moved_N < -MOVED, "unmoved": moved_N.abs() <= MOVED}
    found = {}
    for name, direction in product(CLASSES, DIRECTIONS):
        member_N = torch.tensor([c == name for c in classes]) & of_N[direction]
        if member_N.any():
            found[name, direction] = member_N
    return found


def _loss(hidden_NH: Tensor, head: Head, hidden_NG: Tensor, teacher_head: Head, c_N: Tensor, prompts: int) -> Tensor:
    return divergence(hidden_NH, head, hidden_NG, teacher_head, c_N, normalizer=prompts)[0]


def _accuracy_gradient(
    model: nn.Module, hidden_NH: Tensor, head: Head, groups: Sequence[Group], right: Sequence[Sequence[float]]
) -> Tensor:
    """Of the expected accuracy, from these samples: `Σ_k (r_k - mean of the others) ∇ log p(y_k) / K`, a mean over prompts."""
    advantage = [(own - (sum(row) - own) / (len(row) - 1)) / len(row) if len(row) > 1 else 0.0 for row in right for own in row]
    rollout_N, _ = layout(groups)
    ids_N = torch.cat([group.ids_N for group in groups]).to(hidden_NH.device)
    logp_N = token_log_probs(hidden_NH, head, ids_N)
    return _gradient(model, (torch.tensor(advantage).to(logp_N)[rollout_N] * logp_N).sum() / len(groups))


def _gradient(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for p, g in zip(parameters, found, strict=True)])


def _summary(measured: Sequence[_Batch], name: str) -> dict[str, Any]:
    own = torch.stack([batch.total[name] for batch in measured])
    opd = torch.stack([batch.total["opd"] for batch in measured])
    accuracy = [batch.accuracy for batch in measured if batch.accuracy is not None]
    norm = float(own.square().sum(1).mean())  # 0: the student equals the teacher on every token

    def share(index: int, wanted: str) -> float | None:
        found = sum(value for batch in measured for part, value in batch.shares[name].items() if part[index] == wanted)
        return found / (norm * len(measured)) if norm else None

    return {
        "norm": float(own.mean(0).norm()),
        "signal": _across(own, own) / norm if norm else None,
        "cosine_opd": _cosine(own, opd),
        "cosine_accuracy": _cosine(-own, torch.stack(accuracy)) if accuracy else None,
        "classes": {c: share(0, c) for c in CLASSES},
        "directions": {d: share(1, d) for d in DIRECTIONS},
    }


def _across(x: Tensor, y: Tensor) -> float:
    """Inner product of the expected gradients: the mean over pairs of different batches, in which their noise has no part."""
    n = len(x)
    products = x @ y.T
    return float((products.sum() - products.diagonal().sum()) / (n * (n - 1)))


def _cosine(x: Tensor, y: Tensor) -> float | None:
    own, other = _across(x, x), _across(y, y)
    return _across(x, y) / (own * other) ** 0.5 if own > 0 and other > 0 else None
