"""token_coefficients against the loops on generated layouts, and what the weightings refuse; the laws are in test_laws.py."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vaopd.core as core

from . import reference

# Few distinct values, so that ties and rollouts without advantage are common, and any others.
advantages = st.one_of(st.sampled_from([0.0, 0.0, 0.1, 0.25, 3.0]), st.floats(0, 20, width=32))
shares = st.sampled_from([0.05, 0.07, 0.1, 0.2, 0.3, 0.55, 0.9])
numbers = {"tau": st.sampled_from([0.3, 1.0, 4.0]), "eps": st.sampled_from([1e-6, 1e-3])}
split = {"lam": st.sampled_from([0.0, 0.3, 0.5, 1.0]), "p_visual": st.one_of(shares, st.just(1.0))}
seeds = st.integers(0, 5)
weightings = st.one_of(
    st.builds(core.VAOPD, **numbers, **split),
    st.builds(core.OPD, per_token=st.booleans()),
    st.builds(core.RolloutOnly, **numbers),
    st.builds(core.TokenOnly, **split),
    st.builds(core.RandomTokens, **numbers, **split, seed=seeds),
    st.builds(core.MaskTokens, which=st.sampled_from(["top", "random", "lowest"]), share=shares, seed=seeds),
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    """Advantages, the rollout of each token and the group of each rollout, tokens and rollouts in any order."""
    responses = draw(st.lists(st.lists(advantages, min_size=1, max_size=15), min_size=1, max_size=8))
    group = [draw(st.sampled_from([4, -1, 9])) for _ in responses]
    tokens = [(k, a) for k, response in enumerate(responses) for a in response]
    tokens = draw(st.permutations(tokens)) if draw(st.booleans()) else tokens
    return [a for _, a in tokens], [k for k, _ in tokens], group


def tensors(layout: tuple[list[float], list[int], list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, rollout, group = layout
    return torch.tensor(a, dtype=torch.float64), torch.tensor(rollout), torch.tensor(group)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(layouts(), weightings)
def test_equals_the_loops(layout: tuple[list[float], list[int], list[int]], weighting: core.Weighting) -> None:
    c_N = core.token_coefficients(*tensors(layout), weighting)
    expected = torch.tensor(reference.token_coefficients(*layout, weighting), dtype=torch.float64)
    torch.testing.assert_close(c_N, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layouts(), weightings)
def test_coefficients_are_shares(layout: tuple[list[float], list[int], list[int]], weighting: core.Weighting) -> None:
    a_N, rollout_N, group_R = tensors(layout)
    c_N = core.token_coefficients(a_N.float(), rollout_N, group_R, weighting)
    assert c_N.dtype == torch.float32
    assert (c_N >= 0).all()
    for label in group_R.unique():
        assert float(c_N[group_R[rollout_N] == label].sum()) == pytest.approx(1, abs=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layouts(), st.randoms(use_true_random=False))
def test_renaming_rollouts_and_groups_changes_nothing(layout: tuple[list[float], list[int], list[int]], random: object) -> None:
    a_N, rollout_N, group_R = tensors(layout)
    order = list(range(len(group_R)))
    random.shuffle(order)  # type: ignore[attr-defined]
    renamed_N, moved_R = torch.tensor(order)[rollout_N], torch.empty_like(group_R)
    moved_R[torch.tensor(order)] = 100 - group_R
    whole_N = core.token_coefficients(a_N, rollout_N, group_R, core.VAOPD())
    torch.testing.assert_close(core.token_coefficients(a_N, renamed_N, moved_R, core.VAOPD()), whole_N, rtol=1e-9, atol=1e-12)


def test_random_tokens_differ_from_the_method_in_the_choice_only() -> None:
    a_N = torch.rand(40, generator=torch.Generator().manual_seed(0))
    rollout_N, group_R = torch.arange(40) // 20, torch.zeros(2, dtype=torch.long)
    method, control = (core.token_coefficients(a_N, rollout_N, group_R, w) for w in (core.VAOPD(), core.RandomTokens(seed=5)))
    for tokens in (slice(0, 20), slice(20, 40)):
        torch.testing.assert_close(method[tokens].sort().values, control[tokens].sort().values)
    assert not torch.equal(method, control)


def test_global_random_state_is_neither_read_nor_moved() -> None:
    a_N, zeros = torch.ones(9), torch.zeros(9, dtype=torch.long)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = core.token_coefficients(a_N, zeros, zeros[:1], core.RandomTokens(seed=2))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, core.token_coefficients(a_N, zeros, zeros[:1], core.RandomTokens(seed=2)))


def test_masking_keeps_at_least_one_token_and_masks_alike() -> None:
    a_N = torch.tensor([0.4, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0])
    rollout_N, group_R = torch.tensor([0, 1, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0])
    for which in ("top", "random", "lowest"):
        c_N = core.token_coefficients(a_N, rollout_N, group_R, core.MaskTokens(which, 0.1))
        assert [int((c_N[rollout_N == k] == 0).sum()) for k in range(3)] == [0, 0, 1]
    torch.testing.assert_close(
        core.token_coefficients(a_N, rollout_N, group_R, core.MaskTokens("top"))[4:], torch.tensor([0, 1 / 6, 1 / 6])
    )
    torch.testing.assert_close(
        core.token_coefficients(a_N, rollout_N, group_R, core.MaskTokens("lowest"))[4:], torch.tensor([1 / 6, 0, 1 / 6])
    )


def test_a_weighting_of_one_s_own_needs_two_methods() -> None:
    @dataclass(frozen=True)
    class LastTokens:
        def rollout_shares(self, batch: core.Batch) -> torch.Tensor:
            return 1.0 / batch.siblings_R.double()

        def token_shares(self, batch: core.Batch) -> torch.Tensor:
            place_N = batch.rank_N(torch.arange(len(batch.a_N)).double())
            return (place_N == 0).double()

    c_N = core.token_coefficients(torch.ones(5), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0]), LastTokens())
    assert c_N.tolist() == [0, 0.5, 0, 0, 0.5]


def test_weightings_are_frozen_and_comparable() -> None:
    assert core.VAOPD() == core.VAOPD(tau=1.0, lam=0.5, p_visual=0.2, eps=1e-6)
    with pytest.raises(FrozenInstanceError):
        core.VAOPD().tau = 2.0  # type: ignore[misc]


def test_no_rollouts_give_no_coefficients() -> None:
    empty = torch.empty(0, dtype=torch.long)
    for weighting in (core.VAOPD(), core.OPD(), core.OPD(per_token=True)):
        assert core.token_coefficients(torch.empty(0), empty, empty, weighting).shape == (0,)
    assert core.rollout_weights(torch.empty(0), empty).shape == (0,)


def test_siblings_that_differ_by_rounding_only_stay_uniform() -> None:
    a_N = torch.tensor([0.1] * 3 + [0.1] * 7)
    c_N = core.token_coefficients(a_N, torch.tensor([0] * 3 + [1] * 7), torch.tensor([0, 0]), core.RolloutOnly())
    torch.testing.assert_close(c_N, torch.tensor([1 / 6] * 3 + [1 / 14] * 7), rtol=1e-6, atol=0)


def test_effective_rollouts() -> None:
    w_R, group_R = torch.tensor([0.25, 0.25, 0.25, 0.25, 1.0, 0.0, 0.5, 0.5]), torch.tensor([3, 3, 3, 3, 1, 1, 2, 2])
    assert core.effective_rollouts(w_R, group_R).tolist() == [1.0, 2.0, 4.0]


def test_top_share() -> None:
    assert core.top_share(torch.tensor([0.0] * 8 + [3.0, 1.0]), 0.1) == pytest.approx(0.75)
    assert core.top_share(torch.tensor([0.0] * 8 + [3.0, 1.0]), 0.11) == pytest.approx(1.0)
    assert math.isnan(core.top_share(torch.zeros(5)))
    assert math.isnan(core.top_share(torch.empty(0)))


ONE = torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.token_coefficients(torch.tensor([-0.1]), ONE, ONE, core.VAOPD()), "a_N must be >= 0"),
        (lambda: core.token_coefficients(torch.tensor([float("nan")]), ONE, ONE, core.VAOPD()), "finite"),
        (lambda: core.token_coefficients(torch.zeros(1).half(), ONE, ONE, core.VAOPD()), "float32"),
        (lambda: core.token_coefficients(torch.zeros(2), ONE, ONE, core.VAOPD()), "lengths must agree"),
        (lambda: core.token_coefficients(torch.zeros(1, 1), ONE, ONE, core.VAOPD()), "from_padded"),
        (lambda: core.token_coefficients(torch.zeros(1), ONE + 1, ONE, core.VAOPD()), r"0\.\.0.*from 1 to 1"),
        (lambda: core.token_coefficients(torch.zeros(1), ONE - 1, ONE, core.VAOPD()), "from -1"),
        (lambda: core.token_coefficients(torch.zeros(1), ONE, torch.zeros(3).long(), core.VAOPD()), r"rollouts \[1, 2\] have none"),
        (lambda: core.token_coefficients(torch.empty(0), ONE[:0], ONE, core.VAOPD()), "have none"),
        (lambda: core.token_coefficients(torch.zeros(1), ONE.float(), ONE, core.VAOPD()), "integer"),
        (lambda: core.token_coefficients(torch.zeros(1), ONE, ONE, "va_opd"), "weighting must be an object"),
        (lambda: core.token_coefficients(torch.zeros(1), ONE, ONE, core.VAOPD), "weighting must be an object"),
        (lambda: core.rollout_weights(torch.tensor([float("inf")]), ONE), "mean_R must be finite"),
        (lambda: core.rollout_weights(torch.zeros(2), ONE), "lengths must agree"),
        (lambda: core.rollout_weights(torch.zeros(1), ONE, tau=0), "tau"),
        (lambda: core.rollout_weights(torch.zeros(1), ONE, eps=0.0), "eps"),
        (lambda: core.effective_rollouts(torch.zeros(2), ONE), "lengths must agree"),
        (lambda: core.visual_tokens(torch.zeros(1), ONE, p_visual=0), "p_visual"),
        (lambda: core.top_share(torch.zeros(1), 0), "share"),
        (lambda: core.VAOPD(tau=-1), "tau"),
        (lambda: core.VAOPD(lam=1.5), "lam"),
        (lambda: core.TokenOnly(p_visual=0.0), "p_visual"),
        (lambda: core.RolloutOnly(eps=0.0), "eps"),
        (lambda: core.RandomTokens(p_visual=2.0), "p_visual"),
        (lambda: core.MaskTokens("best"), "'best'"),  # type: ignore[arg-type]
        (lambda: core.MaskTokens(share=1.0), "share"),
    ],
)
def test_refuses(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
