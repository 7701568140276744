"""Held-out evaluation: avg@k with its standard error clustered by question, and how a model does when it can't see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vaopd.core import top_share, visual_advantage
from vaopd.evaluate.grade import is_correct
from vaopd.types import DEGRADED, ORIGINAL, Example, Group, Prompt, RolloutEngine, Teacher


@dataclass(frozen=True)
class Answers:
    """A model's K sampled responses to each of Q questions."""

    groups: list[Group]
    texts: list[list[str]]  # Q lists of K
    correct_QK: Tensor | None  # fp64 0 or 1; None when the data has no answers

    @property
    def accuracy_Q(self) -> Tensor:
        """(Q,) mean correctness of each question: avg@k before the mean over questions."""
        if self.correct_QK is None:
            raise ValueError("the data has no answers, so there is no accuracy. Add the field 'answer' to its rows")
        return self.correct_QK.mean(dim=1)

    def summary(self) -> dict[str, float | None]:
        """accuracy and its standard error over questions (`None` without answers), mean response length, share of truncated ones."""
        lengths = [length for group in self.groups for length in group.lengths]
        ended = [ended for group in self.groups for ended in group.ended_K]
        graded = self.correct_QK is not None
        return {
            "accuracy": float(self.accuracy_Q.mean()) if graded else None,
            "se": standard_error(self.accuracy_Q) if graded else None,
            "tokens": sum(lengths) / len(lengths),
            "truncated": 1 - sum(ended) / len(ended),
        }


def answer(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    answers: Sequence[str | None],
    decode: Callable[[Tensor], str],
    *,
    k: int,
    step: int = 0,
) -> Answers:
    """Sample K responses to each prompt and grade them.

    Args:
        answers: the right answer of each prompt; a single None among them makes the whole set ungraded.
        decode: token ids -> text without control tokens.
        step: selects the sampling noise.
    """
    groups = engine.generate(prompts, k, step)
    texts = [[decode(response) for response in group.responses] for group in groups]
    correct_QK = None
    if all(right is not None for right in answers):
        graded = [[is_correct(text, str(right)) for text in row] for row, right in zip(texts, answers, strict=True)]
        correct_QK = torch.tensor(graded, dtype=torch.float64)
    return Answers(groups, texts, correct_QK)


def unseen(groups: Sequence[Group]) -> None:
    """For `answer_in_parts`, where nobody looks."""


def answer_in_parts(
    engine: RolloutEngine,
    examples: Sequence[Example],
    render: Callable[[Example], Prompt],
    decode: Callable[[Tensor], str],
    *,
    k: int,
    at_once: int,
    look: Callable[[Sequence[Group]], None] = unseen,
) -> Answers:
    """As `answer`, with only `at_once` questions rendered at a time: an image of a megapixel is 25 MB once it is rendered.

    Args:
        look: sees the groups of each part while they have their images; those of the result have none.
    """
    parts = []
    for start in range(0, len(examples), at_once):
        asked = examples[start : start + at_once]
        part = answer(engine, [render(example) for example in asked], [example.answer for example in asked], decode, k=k)
        look(part.groups)
        parts.append(replace(part, groups=[replace(g, prompt=replace(g.prompt, images={})) for g in part.groups]))
    graded = [part.correct_QK for part in parts if part.correct_QK is not None]
    return Answers(
        [group for part in parts for group in part.groups],
        [texts for part in parts for texts in part.texts],
        torch.cat(graded) if parts and len(graded) == len(parts) else None,
    )


def standard_error(accuracy_Q: Tensor) -> float:
    """Standard error of the mean over questions: the K samples of a question are one cluster, not K observations."""
    return float(accuracy_Q.std(correction=1) / math.sqrt(len(accuracy_Q))) if len(accuracy_Q) > 1 else math.nan


def gain(before_Q: Tensor, after_Q: Tensor) -> dict[str, float]:
    """after - before in percentage points with its 95 % interval (normal), paired by question and clustered by it."""
    difference_Q = 100 * (after_Q - before_Q)
    points, half = float(difference_Q.mean()), 1.96 * standard_error(difference_Q)
    return {"points": points, "low": points - half, "high": points + half}


def teacher_advantages(teacher: Teacher, groups: Sequence[Group], deadband: float) -> Tensor:
    """(N,) eq. 2 on these rollouts: how much the teacher's view of them depends on the image."""
    scores = teacher.score(groups, (ORIGINAL, DEGRADED))
    original_N, degraded_N = (torch.cat([score.logp_N[view] for score in scores]) for view in (ORIGINAL, DEGRADED))
    return visual_advantage(original_N, degraded_N, deadband=deadband).cpu()


def mass_curve(a_N: Tensor, points: int = 101) -> dict[str, list[float]]:
    """Share of the advantage mass in the top share of tokens, at `points` equally spaced shares from 0 to 1."""
    sorted_N = a_N.double().sort(descending=True).values
    mass_N = torch.cat([torch.zeros(1, dtype=torch.float64), sorted_N.cumsum(0)])
    shares = torch.linspace(0, 1, points, dtype=torch.float64)
    place = shares * len(a_N)
    low = place.floor().long().clamp(max=len(a_N))
    high = place.ceil().long().clamp(max=len(a_N))
    value = mass_N[low] + (mass_N[high] - mass_N[low]) * (place - low)
    return {"tokens": shares.tolist(), "mass": (value / mass_N[-1].clamp(min=1e-30)).tolist()}


def advantage_summary(a_N: Tensor) -> dict[str, float | None]:
    """Mean advantage in nats per token, and the share of its mass in the top 10 % of tokens."""
    share = top_share(a_N)
    return {"va": float(a_N.mean()), "va_top10": None if math.isnan(share) else share}
