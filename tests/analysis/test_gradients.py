"""The gradient probe against direct derivatives of the same losses, and cases whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from small_pair import Pair, example, make_group, picture
from vaopd.analysis.gradients import WEIGHTINGS, _accuracy_gradient, _across, _Batch, _cosine, _summary, gradient_probe, weightings_of
from vaopd.config import MethodConfig
from vaopd.core import OPD, VAOPD, TokenOnly, Weighting, token_log_probs
from vaopd.errors import ConfigError
from vaopd.models.forward import head_of, rows
from vaopd.teachers.local import LocalTeacher
from vaopd.types import ORIGINAL, Group

CLASSES = ("number", "word", "word", "punctuation", "other")


@pytest.fixture
def groups(pair: Pair) -> list[Group]:
    prompts = [pair.renderer(example(str(i), "How long is the longest side?", picture(32, 32, i))) for i in range(4)]
    return [make_group(prompt, [5, 5, 5], seed) for seed, prompt in enumerate(prompts)]


def scorer(pair: Pair, model: Any) -> LocalTeacher:
    return LocalTeacher(model, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=10_000)


def run(pair: Pair, groups: list[Group], weightings: Mapping[str, Weighting] = WEIGHTINGS, batches: int = 2) -> dict[str, dict[str, float]]:
    classes = [CLASSES[i % 5] for group in groups for _ in group.responses for i in range(5)]
    student, teacher = scorer(pair, pair.fresh()), scorer(pair, pair.teacher)
    return gradient_probe(student, teacher, groups, classes, None, deadband=0.0, weightings=weightings, batches=batches)


def test_shares_add_up_and_opd_agrees_with_itself(pair: Pair, groups: list[Group]) -> None:
    found = run(pair, groups)
    assert set(found) == set(WEIGHTINGS)
    for entry in found.values():
        assert sum(entry["classes"].values()) == pytest.approx(1, abs=1e-4)
        assert sum(entry["directions"].values()) == pytest.approx(1, abs=1e-4)
        assert entry["cosine_accuracy"] is None
        assert entry["signal"] < 1
    assert found["opd"]["cosine_opd"] in (None, pytest.approx(1, abs=1e-5))


def test_batches_of_the_same_groups_have_no_noise(pair: Pair, groups: list[Group]) -> None:
    entry = run(pair, groups[:1] * 3, batches=3)["va_opd"]
    assert entry["signal"] == pytest.approx(1, abs=1e-4)
    assert -1 <= entry["cosine_opd"] <= 1


def test_a_part_whose_weight_is_zero_has_no_share(pair: Pair, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """λ = 1: all mass lies on the one token in five of largest advantage, which `towards` holds; λ = |V|/T is OPD itself."""
    monkeypatch.setattr("vaopd.analysis.gradients.MOVED", 0.0)
    weightings = {"opd": OPD(), "visual": TokenOnly(lam=1.0, p_visual=0.2), "plain": TokenOnly(lam=0.2, p_visual=0.2)}
    found = run(pair, groups[:2] * 2, weightings)
    assert found["visual"]["directions"]["against"] == pytest.approx(0, abs=1e-6)
    assert found["visual"]["directions"]["towards"] == pytest.approx(1, abs=1e-4)
    assert abs(found["opd"]["directions"]["against"]) > 1e-3
    assert found["plain"]["cosine_opd"] == pytest.approx(1, abs=1e-4)
    assert found["plain"]["norm"] == pytest.approx(found["opd"]["norm"], rel=1e-4)


def test_the_accuracy_gradient_is_that_of_the_right_siblings_over_the_others(pair: Pair, groups: list[Group]) -> None:
    """Of three siblings the first is right: (log p_1 - (log p_2 + log p_3) / 2) / 3, derived directly."""
    model = pair.fresh()
    head = head_of(model, pair.vocab_size)

    def gap() -> torch.Tensor:
        logp_RT = token_log_probs(rows(model, groups[:1], ORIGINAL), head, groups[0].ids_N).reshape(3, 5)
        first, second, third = logp_RT.sum(1)
        return (first - (second + third) / 2) / 3

    grads = torch.autograd.grad(gap(), list(model.parameters()), allow_unused=True)
    expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(model.parameters(), grads, strict=True)])
    found = _accuracy_gradient(model, rows(model, groups[:1], ORIGINAL), head, groups[:1], [[1.0, 0.0, 0.0]])
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float(expected.norm()) > 0


def test_a_step_down_the_gradient_is_compared_with_a_step_up_the_accuracy() -> None:
    """Accuracy rises along (-1, 0): a loss of gradient (1, 0) leads there, one of (-1, 0) away, and OPD's own is at 45° to it."""
    up, diagonal = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0])
    for gradient, expected in (((1.0, 0.0), 1.0), ((-1.0, 0.0), -1.0), ((0.0, 1.0), 0.0)):
        batches = [_Batch({"opd": diagonal, "mine": torch.tensor(gradient)}, {"opd": {}, "mine": {}}, up)] * 2
        found = _summary(batches, "mine")
        assert found["cosine_accuracy"] == pytest.approx(expected)
        assert found["cosine_opd"] == pytest.approx(sum(gradient) / 2**0.5)
        assert (found["norm"], found["signal"]) == (1, 1)


def test_a_student_that_equals_its_teacher_has_nothing_to_divide_by() -> None:
    found = _summary([_Batch({"opd": torch.zeros(2)}, {"opd": {("word", "unmoved"): 0.0}}, None)] * 2, "opd")
    assert found["norm"] == 0
    assert {found[key] for key in ("signal", "cosine_opd", "cosine_accuracy")} == {None}
    assert set(found["classes"].values()) == set(found["directions"].values()) == {None}


def test_products_across_batches_leave_the_noise_out() -> None:
    """Signal (1, 0), noise of ±1 in the other coordinate: a batch's square is 2, of which half is signal."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]] * 50)
    assert _across(x, x) == pytest.approx(1, abs=0.02)
    assert _cosine(x, torch.tensor([[2.0, 0.0]] * 100)) == pytest.approx(1, abs=0.02)
    assert _cosine(x, torch.tensor([[0.0, 1.0]] * 100)) == pytest.approx(0, abs=0.02)
    assert _cosine(torch.tensor([[1.0], [-1.0]]), x[:2, :1]) is None


def test_the_model_is_left_as_it_was(pair: Pair, groups: list[Group]) -> None:
    model = pair.fresh()
    model.requires_grad_(False)
    student, teacher = scorer(pair, model), scorer(pair, pair.teacher)
    found = gradient_probe(student, teacher, groups, ["word"] * 60, [[1.0, 0.0, 0.0]] * 4, deadband=0.0, batches=2)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(math.isfinite(entry["norm"]) for entry in found.values())
    with pytest.raises(ValueError, match="two or more"):
        gradient_probe(student, teacher, groups[:1], ["word"] * 15, None, deadband=0.0, batches=2)


def test_a_weighting_of_ones_own_is_measured_beside_the_named_ones() -> None:
    """By the name of its method, with its own numbers."""
    methods = [MethodConfig.from_option(text, "--method") for text in ("{va_opd: {tau: 2}}", "mask_tokens")]
    found = weightings_of(methods)
    assert list(found) == [*WEIGHTINGS, "va_opd(tau=2)", "mask_tokens"]
    assert found["va_opd(tau=2)"] == VAOPD(tau=2)
    with pytest.raises(ConfigError, match="'sft' learns from the data's solutions"):
        weightings_of([MethodConfig.from_option("sft", "--method")])
