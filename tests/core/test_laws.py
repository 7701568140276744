"""The laws of the method, each short enough to check by eye. `test_mutations.py` runs the same functions on broken copies of the core."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace

import pytest
import torch

import vaopd.core

from . import reference

DIVERGENCES = ["reverse_kl", "forward_kl", "jsd", "jsd:0.3"]


@pytest.fixture
def core() -> ModuleType:
    return vaopd.core


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(x: torch.Tensor, y: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype), rtol=0, atol=tolerance)


def two_prompts() -> SimpleNamespace:
    """Two prompts with 3 and 2 siblings of 6, 1, 4 and 3, 5 tokens; ties, a rollout without advantage, labels that are not 0 and 1."""
    a_N = f64(0.0, 2.0, 0.5, 2.0, 0.0, 0.1, 0.3, 0.0, 0.0, 0.0, 0.0, 0.7, 0.1, 0.0, 0.2, 0.2, 0.2, 0.0, 0.9)
    rollout_N = torch.tensor([0] * 6 + [1] + [2] * 4 + [3] * 3 + [4] * 5)
    return SimpleNamespace(a_N=a_N, rollout_N=rollout_N, group_R=torch.tensor([7, 7, 7, 2, 2]), tokens_B=[slice(0, 11), slice(11, 19)])


def weightings(core: ModuleType) -> list[object]:
    return [
        core.VAOPD(),
        core.VAOPD(tau=0.5, lam=0.8, p_visual=0.4),
        core.OPD(),
        core.OPD(per_token=True),
        core.RolloutOnly(tau=2.0),
        core.TokenOnly(lam=0.3),
        core.RandomTokens(seed=3),
        *(core.MaskTokens(which, 0.3, seed=1) for which in ("top", "random", "lowest")),
    ]


def pair(core: ModuleType, n: int = 7, *, padded: int = 3) -> SimpleNamespace:
    """A student and a teacher in float64 over 11 ids with everything a head can have: bias, scale, cap, padded rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight_VH, bias_V = normal(11 + padded, 4).requires_grad_(), normal(11 + padded).requires_grad_()
    student = core.Head(weight_VH, bias_V, scale=0.7, softcap=3.0, vocab_size=11)
    teacher = core.Head(normal(11 + 2 * padded, 5).requires_grad_(), scale=1.3, vocab_size=11)
    hidden_NH, teacher_NG = normal(n, 4).requires_grad_(), normal(n, 5).requires_grad_()
    c_N = torch.rand(n, dtype=torch.float64, generator=generator)
    return SimpleNamespace(
        args=(hidden_NH, student, teacher_NG, teacher),
        c_N=c_N,
        student_side=(hidden_NH, weight_VH, bias_V),
        teacher_side=(teacher_NG, teacher.weight_VH),
    )


def plain_logits(hidden_NH: torch.Tensor, head: object) -> list[list[float]]:
    z_NV = hidden_NH @ head.weight_VH.T
    z_NV = head.scale * (z_NV if head.bias_V is None else z_NV + head.bias_V)
    z_NV = z_NV if head.softcap is None else head.softcap * (z_NV / head.softcap).tanh()
    return z_NV.detach()[:, :11].tolist()


# Eq. 2


def test_advantage_by_hand(core: ModuleType) -> None:
    a_N = core.visual_advantage(f64(-1.0, -2.0, -0.5, -3.0), f64(-2.0, -1.0, -0.50005, -3.0))
    close(a_N, [1.0, 0.0, 0.0, 0.0])
    close(core.visual_advantage(f64(-0.5), f64(-0.50005), deadband=0), [5e-5])
    close(core.visual_advantage(f64(-0.5), f64(-0.75), deadband=0.25), [0.25])


def test_equal_views_give_zero_advantage_and_uniform_weights(core: ModuleType) -> None:
    logp_N = f64(-1.0, -0.2, -3.0, -0.7, -0.1)
    a_N = core.visual_advantage(logp_N, logp_N)
    close(a_N, [0.0] * 5)
    close(core.token_coefficients(a_N, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0]), core.VAOPD()), [1 / 6] * 3 + [1 / 4] * 2)


def test_noise_below_the_deadband_chooses_nothing(core: ModuleType) -> None:
    original_N = f64(-1.0, -1.0, -1.0, -1.0, -2.0, -2.0, -2.0, -2.0)
    noise_N = f64(0, 3e-6, 0, 1e-6, 0, 0, 0, 2e-6)
    a_N = core.visual_advantage(original_N + noise_N, original_N)
    close(core.token_coefficients(a_N, torch.arange(8) // 4, torch.tensor([0, 0]), core.VAOPD()), [1 / 8] * 8)


# Eq. 3-4


def test_golden_weights_of_the_method_figure(core: ModuleType) -> None:
    w_R = core.rollout_weights(f64(0.045, 0.030, 0.020, 0.010), torch.zeros(4, dtype=torch.long))
    close(w_R, [0.656, 0.206, 0.095, 0.044], 5e-4)


def test_no_weight_of_four_siblings_exceeds_0_770(core: ModuleType) -> None:
    w_R = core.rollout_weights(f64(9.0, 0.0, 0.0, 0.0), torch.zeros(4, dtype=torch.long))
    bound = 1 / (1 + 3 * math.exp(-4 / math.sqrt(3)))
    assert round(bound, 3) == 0.770
    close(w_R.max(), bound, 1e-6)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-8, 1e-3, 1.0, 1e3):
        mean_R = torch.rand(400, dtype=torch.float64, generator=generator).pow(8) * scale
        assert core.rollout_weights(mean_R, torch.arange(400) // 4).max() <= bound


def test_equal_means_give_uniform_weights(core: ModuleType) -> None:
    close(core.rollout_weights(f64(0.3, 0.3, 0.3), torch.zeros(3, dtype=torch.long)), [1 / 3] * 3)
    close(core.rollout_weights(f64(0.3), torch.zeros(1, dtype=torch.long)), [1.0])


# Eq. 5 and the coefficients


def test_one_visual_token_weighs_four_language_tokens(core: ModuleType) -> None:
    c_N = core.token_coefficients(
        f64(0.0, 0.1, 0.9, 0.0, 0.3), torch.zeros(5, dtype=torch.long), torch.zeros(1, dtype=torch.long), core.VAOPD()
    )
    close(c_N, [0.125, 0.125, 0.5, 0.125, 0.125])


def test_group_means_by_hand(core: ModuleType) -> None:
    # |V_k| = ceil(0.2 · 6) = 2; the visual tokens share 0.8, the other four 0.2.
    a_N = f64(0.1, 0.9, 0.0, 0.4, 0.2, 0.3)
    c_N = core.token_coefficients(a_N, torch.zeros(6, dtype=torch.long), torch.zeros(1, dtype=torch.long), core.VAOPD(lam=0.8))
    close(c_N, [0.05, 0.4, 0.05, 0.4, 0.05, 0.05])


def test_ties_go_to_the_earlier_token(core: ModuleType) -> None:
    a_N = f64(*([0.0] + [0.5] * 39))
    is_visual_N = core.visual_tokens(a_N, torch.zeros(40, dtype=torch.long))
    assert is_visual_N.nonzero().flatten().tolist() == list(range(1, 9))


def test_exact_multiples_are_not_rounded_up(core: ModuleType) -> None:
    assert 0.07 * 100 > 7
    a_N = torch.arange(1, 101, dtype=torch.float64)
    assert int(core.visual_tokens(a_N, torch.zeros(100, dtype=torch.long), p_visual=0.07).sum()) == 7


def test_no_advantage_in_one_response_gives_it_uniform_tokens(core: ModuleType) -> None:
    a_N = f64(0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0)
    rollout_N, group_R = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 0])
    close(core.token_coefficients(a_N, rollout_N, group_R, core.TokenOnly()), [0.125] * 4 + [0.25, 0.125, 0.125])
    assert not core.visual_tokens(a_N, rollout_N)[:4].any()


def test_single_tokens_and_full_sets_carry_all_mass(core: ModuleType) -> None:
    one = torch.zeros(1, dtype=torch.long)
    close(core.token_coefficients(f64(0.4), one, one, core.VAOPD()), [1.0])
    close(core.token_coefficients(f64(0.4, 0.1), torch.zeros(2, dtype=torch.long), one, core.VAOPD(p_visual=1.0, lam=0.3)), [0.5, 0.5])


def test_coefficients_sum_to_one_in_each_prompt(core: ModuleType) -> None:
    x = two_prompts()
    for weighting in weightings(core):
        c_N = core.token_coefficients(x.a_N, x.rollout_N, x.group_R, weighting)
        close(torch.stack([c_N[tokens].sum() for tokens in x.tokens_B]), [1.0, 1.0])


def test_every_weighting_equals_the_loops(core: ModuleType) -> None:
    x = two_prompts()
    for weighting in weightings(core):
        c_N = core.token_coefficients(x.a_N, x.rollout_N, x.group_R, weighting)
        close(c_N, reference.token_coefficients(x.a_N.tolist(), x.rollout_N.tolist(), x.group_R.tolist(), weighting))


def test_opd_is_the_mean_of_response_means(core: ModuleType) -> None:
    c_N = core.token_coefficients(f64(1.0, 0.0, 0.0, 2.0), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0]), core.OPD())
    close(c_N, [1 / 6] * 3 + [1 / 2])


def test_opd_per_token_is_the_mean_of_all_tokens_of_a_prompt(core: ModuleType) -> None:
    c_N = core.token_coefficients(torch.zeros(6), torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([5, 5, 3]), core.OPD(per_token=True))
    close(c_N, [1 / 4] * 4 + [1 / 2] * 2)


def test_permuting_siblings_permutes_weights(core: ModuleType) -> None:
    mean_R, order = f64(0.4, 0.1, 0.2, 0.9), torch.tensor([2, 0, 3, 1])
    zeros = torch.zeros(4, dtype=torch.long)
    close(core.rollout_weights(mean_R[order], zeros), core.rollout_weights(mean_R, zeros)[order])


def test_token_order_within_the_call_is_free(core: ModuleType) -> None:
    x = two_prompts()
    # All first tokens, then all second tokens, ...: the order inside each rollout stays, so ties fall alike.
    place_N = torch.cat([torch.arange(length) for length in x.rollout_N.bincount().tolist()])
    order = torch.argsort(place_N, stable=True)
    whole_N = core.token_coefficients(x.a_N, x.rollout_N, x.group_R, core.VAOPD())
    close(core.token_coefficients(x.a_N[order], x.rollout_N[order], x.group_R, core.VAOPD()), whole_N[order])


def test_prompts_do_not_mix(core: ModuleType) -> None:
    x = two_prompts()
    whole_N = core.token_coefficients(x.a_N, x.rollout_N, x.group_R, core.VAOPD())
    for tokens, label in zip(x.tokens_B, (7, 2), strict=True):
        rollout_N = x.rollout_N[tokens] - x.rollout_N[tokens][0]
        close(core.token_coefficients(x.a_N[tokens], rollout_N, x.group_R[x.group_R == label], core.VAOPD()), whole_N[tokens])


def test_random_tokens_follow_their_seed(core: ModuleType) -> None:
    a_N, rollout_N, group_R = (
        torch.rand(60, generator=torch.Generator().manual_seed(0)),
        torch.arange(60) // 15,
        torch.zeros(4, dtype=torch.long),
    )
    first, again, other = (core.token_coefficients(a_N, rollout_N, group_R, core.RandomTokens(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_from_padded_keeps_response_tokens_and_their_rows(core: ModuleType) -> None:
    mask_RT = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    x_N, rollout_N = core.from_padded(torch.arange(8).reshape(2, 4), mask_RT)
    assert x_N.tolist() == [0, 1, 5, 6, 7]
    assert rollout_N.tolist() == [0, 0, 1, 1, 1]


# Eq. 1 and 6


def test_log_probs_equal_the_loops(core: ModuleType) -> None:
    x = pair(core)
    hidden_NH, head = x.args[:2]
    ids_N = torch.tensor([3, 0, 10, 7, 1, 5, 5])
    expected = [reference.log_softmax(z)[y] for z, y in zip(plain_logits(hidden_NH, head), ids_N.tolist(), strict=True)]
    close(core.token_log_probs(hidden_NH, head, ids_N, chunk=3), expected)


def test_log_prob_gradients_equal_autograd(core: ModuleType) -> None:
    x = pair(core)
    hidden_NH, head = x.args[:2]
    ids_N = torch.tensor([3, 0, 10, 7, 1, 5, 5])
    direct_N = head.logits(hidden_NH).log_softmax(-1).gather(-1, ids_N[:, None])[:, 0]
    expected = torch.autograd.grad((x.c_N * direct_N).sum(), x.student_side)
    actual = torch.autograd.grad((x.c_N * core.token_log_probs(hidden_NH, head, ids_N, chunk=3)).sum(), x.student_side)
    for mine, theirs in zip(actual, expected, strict=True):
        close(mine, theirs)


def test_divergences_equal_the_loops(core: ModuleType) -> None:
    x = pair(core)
    rows = list(zip(plain_logits(*x.args[:2]), plain_logits(*x.args[2:]), strict=True))
    for name in DIVERGENCES:
        expected = [reference.divergence(name, student, teacher) for student, teacher in rows]
        close(core.token_divergence(*x.args, divergence=name), expected)
        close(core.fused_weighted_divergence(*x.args, x.c_N, divergence=name, chunk=3)[1], expected)
        with torch.no_grad():
            close(core.fused_weighted_divergence(*x.args, x.c_N, divergence=name, chunk=3)[1], expected)


def test_fused_loss_and_gradients_equal_autograd(core: ModuleType) -> None:
    x = pair(core)
    for name in DIVERGENCES:
        expected = (x.c_N * core.token_divergence(*x.args, divergence=name)).sum() / 2.5
        loss, _ = core.fused_weighted_divergence(*x.args, x.c_N, normalizer=2.5, divergence=name, chunk=3)
        close(loss, expected)
        for mine, theirs in zip(
            torch.autograd.grad(3 * loss, x.student_side), torch.autograd.grad(3 * expected, x.student_side), strict=True
        ):
            close(mine, theirs)


def test_same_student_and_teacher_have_no_loss(core: ModuleType) -> None:
    x = pair(core)
    for name in DIVERGENCES:
        loss, kl_N = core.fused_weighted_divergence(*x.args[:2], *x.args[:2], x.c_N, divergence=name)
        close(kl_N, [0.0] * 7)
        for gradient in torch.autograd.grad(loss, x.student_side):
            close(gradient, torch.zeros_like(gradient))


def test_gradient_reaches_the_student_only(core: ModuleType) -> None:
    for function in (core.token_divergence, lambda *args: core.fused_weighted_divergence(*args, pair(core).c_N)[0]):
        x = pair(core)
        function(*x.args).sum().backward()
        assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in x.student_side)
        assert all(leaf.grad is None for leaf in x.teacher_side)


def test_padded_rows_carry_no_probability(core: ModuleType) -> None:
    x = pair(core)
    before = core.fused_weighted_divergence(*x.args, x.c_N)[0]
    with torch.no_grad():
        x.student_side[1][11:] += 50
        x.teacher_side[1][11:] -= 50
    after = core.fused_weighted_divergence(*x.args, x.c_N)[0]
    close(after, before)
    assert torch.autograd.grad(after, x.student_side[1])[0][11:].abs().sum() == 0


def test_a_split_batch_equals_the_whole(core: ModuleType) -> None:
    x = pair(core)
    hidden_NH, student, teacher_NG, teacher = x.args
    whole, _ = core.fused_weighted_divergence(*x.args, x.c_N, normalizer=3.0)
    parts = [
        core.fused_weighted_divergence(hidden_NH[rows], student, teacher_NG[rows], teacher, x.c_N[rows], normalizer=3.0)[0]
        for rows in (slice(0, 2), slice(2, 7))
    ]
    close(sum(parts), whole)
    for mine, theirs in zip(torch.autograd.grad(sum(parts), x.student_side), torch.autograd.grad(whole, x.student_side), strict=True):
        close(mine, theirs)
