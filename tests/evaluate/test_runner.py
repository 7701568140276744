"""Means, standard errors and curves, worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vaopd.core import Head
from vaopd.evaluate.runner import Answers, advantage_summary, answer, gain, mass_curve, standard_error, teacher_advantages
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt, Scores


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_answers(correct: list[list[int]]) -> Answers:
    groups = [
        Group(Prompt(str(q), torch.arange(2)), tuple(torch.arange(3 + k) for k in range(len(row))), tuple(k == 0 for k in range(len(row))))
        for q, row in enumerate(correct)
    ]
    return Answers(groups, [["text"] * len(row) for row in correct], torch.tensor(correct, dtype=torch.float64))


def test_summary_by_hand() -> None:
    """Three questions with 1, 1/2 and 0 of two answers right: mean 1/2, sample std 1/2, se = 0.5/√3."""
    summary = make_answers([[1, 1], [1, 0], [0, 0]]).summary()
    assert summary == {"accuracy": 0.5, "se": pytest.approx(0.5 / math.sqrt(3)), "tokens": 3.5, "truncated": 0.5}


def test_standard_error_by_hand() -> None:
    assert standard_error(f64(0.0, 1.0)) == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    assert standard_error(f64(0.2, 0.4, 0.9)) == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2 / 3))
    assert standard_error(f64(0.5, 0.5, 0.5)) == 0.0
    assert math.isnan(standard_error(f64(0.5))), "one question says nothing about the spread over questions"


@pytest.mark.parametrize("copies", [2, 8])
def test_more_samples_that_say_the_same_do_not_shrink_the_error(copies: int) -> None:
    """The question is the cluster: copying each question's samples adds no evidence."""
    correct = [[1, 0], [1, 1], [0, 0], [0, 1], [1, 1]]
    once, often = make_answers(correct).summary(), make_answers([row * copies for row in correct]).summary()
    assert often["accuracy"] == once["accuracy"]
    assert often["se"] == pytest.approx(once["se"])
    naive = torch.tensor([row * copies for row in correct], dtype=torch.float64).flatten()
    assert standard_error(naive) < 0.8 * once["se"]


def test_gain_by_hand() -> None:
    """Differences of 50, 0 and -20 points: mean 10, sample std √1300, half width 1.96·√(1300/3)."""
    found = gain(f64(0.0, 0.5, 0.7), f64(0.5, 0.5, 0.5))
    half = 1.96 * math.sqrt(1300 / 3)
    assert found == {"points": pytest.approx(10), "low": pytest.approx(10 - half), "high": pytest.approx(10 + half)}


def test_gain_is_paired() -> None:
    """A constant difference has no spread, however far the questions lie apart; its sign is after minus before."""
    assert gain(f64(0.0, 0.3, 0.8), f64(0.1, 0.4, 0.9)) == {key: pytest.approx(10) for key in ("points", "low", "high")}
    assert gain(f64(0.1, 0.4, 0.9), f64(0.0, 0.3, 0.8))["points"] == pytest.approx(-10)


def test_mass_curve_by_hand() -> None:
    """Advantages 6, 3, 1, 0 sum to 10: after a quarter of the tokens 6/10, after half 9/10, after three quarters all."""
    curve = mass_curve(torch.tensor([1.0, 6.0, 0.0, 3.0]), points=9)
    assert curve["tokens"] == pytest.approx([0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1])
    assert curve["mass"] == pytest.approx([0, 0.3, 0.6, 0.75, 0.9, 0.95, 1.0, 1.0, 1.0])


def test_mass_curve_of_even_mass_is_the_diagonal_and_of_none_is_zero() -> None:
    even = mass_curve(torch.full((7,), 0.3))
    assert even["mass"] == pytest.approx(even["tokens"])
    assert mass_curve(torch.zeros(5))["mass"] == [0.0] * 101


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=60))
def test_mass_curve_rises_concavely(values: list[float]) -> None:
    curve = mass_curve(torch.tensor(values))
    mass = torch.tensor(curve["mass"], dtype=torch.float64)
    steps = mass.diff()
    assert len(mass) == 101
    assert bool((steps >= -1e-9).all())
    assert bool((steps.diff() <= 1e-6).all()), "the largest come first"
    assert float(mass[-1]) == pytest.approx(1) or sum(values) < 1e-25


def test_advantage_summary_by_hand() -> None:
    """Twenty tokens, two of them with 3 and 1 nats, the rest with 1/18 each: the top two hold 4 of 5."""
    a_N = torch.tensor([3.0, 1.0] + [1 / 18] * 18)
    found = advantage_summary(a_N)
    assert found["va"] == pytest.approx(5 / 20)
    assert found["va_top10"] == pytest.approx(4 / 5)
    assert advantage_summary(torch.zeros(4))["va_top10"] is None


class Echo:
    """Answers every prompt with the same texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.asked = texts, []

    def generate(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        self.asked.append((len(prompts), k, step))
        return [Group(p, tuple(torch.tensor([i]) for i in range(k)), (True,) * k) for p in prompts]

    def decode(self, ids: Tensor) -> str:
        return self.texts[int(ids)]


def test_answers_are_graded_against_their_own_question() -> None:
    prompts = [Prompt(str(q), torch.arange(2)) for q in range(3)]
    engine = Echo(["The answer is 1.", "The answer is 2."])
    answers = answer(engine, prompts, ["1", "2", "3"], engine.decode, k=2)
    assert answers.correct_QK is not None
    assert answers.correct_QK.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert answers.accuracy_Q.tolist() == [0.5, 0.5, 0.0]
    assert engine.asked == [(3, 2, 0)]


def test_a_set_without_all_answers_is_not_graded() -> None:
    prompts = [Prompt(str(q), torch.arange(2)) for q in range(2)]
    engine = Echo(["The answer is 1."])
    answers = answer(engine, prompts, ["1", None], engine.decode, k=1)
    assert answers.correct_QK is None
    assert answers.summary() == {"accuracy": None, "se": None, "tokens": 1.0, "truncated": 0.0}
    with pytest.raises(ValueError, match="no answers"):
        _ = answers.accuracy_Q


class Fixed:
    """A teacher with given scores."""

    head = Head(torch.zeros(2, 2))

    def __init__(self, scores: list[Scores]) -> None:
        self.scores = scores

    def score(self, groups: Sequence[Group], views: Sequence[str]) -> list[Scores]:
        assert set(views) == {ORIGINAL, DEGRADED}
        return self.scores


def test_teacher_advantages_are_original_minus_degraded() -> None:
    group = Group(Prompt("p", torch.arange(2)), (torch.tensor([1, 2]),), (True,))
    scores = [Scores(torch.zeros(2, 2), {ORIGINAL: torch.tensor([-1.0, -3.0]), DEGRADED: torch.tensor([-1.5, -1.0])})] * 2
    assert teacher_advantages(Fixed(scores), [group, group], 1e-4).tolist() == [0.5, 0.0, 0.5, 0.0]
