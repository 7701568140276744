"""Eq. 3-5 of arXiv 2605.21924: from visual advantages to one coefficient per response token, and every named ablation.

All layouts are flat and ragged: one entry per token, `rollout_N` says to which rollout a token belongs and `group_R` to which prompt a
rollout belongs. A coefficient is the product of two shares, `c_t = w_k · s_t`: what the rollout weighs among its siblings, and what the
token weighs inside its rollout. A weighting is a small class that gives these two, so a new one is one class with two methods.

The arithmetic runs in float64 on the CPU, whatever the device of the input: it is a few thousand numbers, the z-score of eq. 3 divides by
a standard deviation that may be tiny, and sums on a GPU depend on the order of its threads, which would make the weights irreproducible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from ._checks import require_exact, require_finite, require_flat, require_integers, require_positive, require_same_length, require_share
from .advantage import visual_advantage


def _segment_sum(x_N: Tensor, index_N: Tensor, segments: int) -> Tensor:
    return torch.zeros(segments, dtype=x_N.dtype).index_add_(0, index_N, x_N)


def _ceil_share(share: float, length_R: Tensor) -> Tensor:
    """max(1, ceil(share · length)). The margin keeps 0.07 · 100 = 7.000000000000001 from becoming 8."""
    return (share * length_R.double() - 1e-9).ceil().clamp(min=1).long()


@dataclass(frozen=True, eq=False)
class Batch:
    """What a weighting sees: the advantages of one call and their ragged layout, on the CPU."""

    a_N: Tensor  # (N,) float64, nats, >= 0
    rollout_N: Tensor  # (N,) int64, 0..R-1
    group_R: Tensor  # (R,) int64, 0..B-1, every group present

    @cached_property
    def length_R(self) -> Tensor:
        """(R,) tokens of each rollout."""
        return torch.bincount(self.rollout_N, minlength=len(self.group_R))

    @cached_property
    def siblings_R(self) -> Tensor:
        """(R,) K of the group of each rollout."""
        return torch.bincount(self.group_R)[self.group_R]

    @cached_property
    def mean_R(self) -> Tensor:
        """(R,) mean advantage of each rollout: ā of eq. 3."""
        return _segment_sum(self.a_N, self.rollout_N, len(self.group_R)) / self.length_R

    @cached_property
    def depends_on_image_R(self) -> Tensor:
        """(R,) whether the rollout has any token with an advantage above 0."""
        return self.mean_R > 0

    def rank_N(self, score_N: Tensor) -> Tensor:
        """(N,) place of each token inside its rollout by descending score, 0 first; ties in token order."""
        order = torch.sort(score_N, descending=True, stable=True).indices
        order = order[torch.sort(self.rollout_N[order], stable=True).indices]
        start_R = self.length_R.cumsum(0) - self.length_R
        rank_N = torch.empty_like(order)
        rank_N[order] = torch.arange(len(order)) - start_R[self.rollout_N[order]]
        return rank_N

    def random_N(self, seed: int) -> Tensor:
        """(N,) uniform numbers that depend on the seed and N only."""
        return torch.rand(len(self.a_N), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Weighting(Protocol):
    """The seam for a new weighting: its two shares multiply to the coefficient of a token.

    One that ranks by the size of the teacher's difference, whatever its sign, has a true attribute `absolute` besides (`advantage_for`).
    """

    def rollout_shares(self, batch: Batch) -> Tensor:
        """w_R, sums to 1 in each group."""
        ...

    def token_shares(self, batch: Batch) -> Tensor:
        """s_N, sums to 1 in each rollout."""
        ...


def _siblings_alike(batch: Batch) -> Tensor:
    return 1.0 / batch.siblings_R.double()


def _tokens_alike(batch: Batch) -> Tensor:
    return (1.0 / batch.length_R.double())[batch.rollout_N]


def _top(batch: Batch, score_N: Tensor, p_visual: float) -> Tensor:
    """The ceil(p_visual·T) best tokens of each rollout; none in a rollout without advantage, where no token is more visual than another."""
    member_N = batch.rank_N(score_N) < _ceil_share(p_visual, batch.length_R)[batch.rollout_N]
    return member_N & batch.depends_on_image_R[batch.rollout_N]


def _two_means(batch: Batch, is_visual_N: Tensor, lam: float) -> Tensor:
    """Eq. 5 as token shares: λ/|V_k| for the visual tokens, (1-λ)/|L_k| for the others; an empty set leaves all mass to the other."""
    visual_R = _segment_sum(is_visual_N.double(), batch.rollout_N, len(batch.group_R))
    language_R = batch.length_R - visual_R
    one_set_R = (visual_R == 0) | (language_R == 0)
    share_visual_R = torch.full_like(visual_R, lam).masked_fill(one_set_R, 1.0) / visual_R
    share_language_R = torch.full_like(visual_R, 1.0 - lam).masked_fill(one_set_R, 1.0) / language_R
    return torch.where(is_visual_N, share_visual_R[batch.rollout_N], share_language_R[batch.rollout_N])


@dataclass(frozen=True)
class VAOPD:
    """The method, eq. 3-5 of arXiv 2605.21924: siblings by their mean advantage, tokens by membership in V_k."""

    tau: float = 1.0  # temperature of the softmax over siblings
    lam: float = 0.5  # mass of the visual tokens of a rollout
    p_visual: float = 0.2  # share of a rollout's tokens that are in V_k
    eps: float = 1e-6  # beside the standard deviation, in nats
    absolute: bool = False  # of the siblings and tokens: by |difference|, not by its positive part (not in the paper)

    def __post_init__(self) -> None:
        require_positive(tau=self.tau, eps=self.eps)
        _require_split(self.lam, self.p_visual)

    def rollout_shares(self, batch: Batch) -> Tensor:
        return rollout_weights(batch.mean_R, batch.group_R, tau=self.tau, eps=self.eps)

    def token_shares(self, batch: Batch) -> Tensor:
        return _two_means(batch, _top(batch, batch.a_N, self.p_visual), self.lam)


@dataclass(frozen=True)
class OPD:
    """The baseline, eq. 1: the mean over tokens of each response, then the mean over siblings, `c_t = 1/(K·T_k)`.

    With `per_token` the mean over all tokens of the siblings, `c_t = 1/ΣT_k`: longer responses weigh more (not in the paper).
    """

    per_token: bool = False

    def rollout_shares(self, batch: Batch) -> Tensor:
        if not self.per_token:
            return _siblings_alike(batch)
        return batch.length_R / torch.bincount(batch.group_R, batch.length_R.double())[batch.group_R]

    def token_shares(self, batch: Batch) -> Tensor:
        return _tokens_alike(batch)


@dataclass(frozen=True)
class RolloutOnly:
    """Eq. 3-4 without eq. 5: `c_t = w_k/T_k`."""

    tau: float = 1.0
    eps: float = 1e-6
    absolute: bool = False

    def __post_init__(self) -> None:
        require_positive(tau=self.tau, eps=self.eps)

    def rollout_shares(self, batch: Batch) -> Tensor:
        return rollout_weights(batch.mean_R, batch.group_R, tau=self.tau, eps=self.eps)

    def token_shares(self, batch: Batch) -> Tensor:
        return _tokens_alike(batch)


@dataclass(frozen=True)
class TokenOnly:
    """Eq. 5 without eq. 3-4: the two group means, siblings alike (`w_k = 1/K`)."""

    lam: float = 0.5
    p_visual: float = 0.2
    absolute: bool = False

    def __post_init__(self) -> None:
        _require_split(self.lam, self.p_visual)

    def rollout_shares(self, batch: Batch) -> Tensor:
        return _siblings_alike(batch)

    def token_shares(self, batch: Batch) -> Tensor:
        return _two_means(batch, _top(batch, batch.a_N, self.p_visual), self.lam)


@dataclass(frozen=True)
class RandomTokens:
    """The control of VAOPD: the same rollout weights and the same |V_k|, but V_k drawn at random.

    The draw depends on the seed and the layout of the call only, so give every step (and process) its own seed.
    """

    tau: float = 1.0
    lam: float = 0.5
    p_visual: float = 0.2
    eps: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(tau=self.tau, eps=self.eps)
        _require_split(self.lam, self.p_visual)

    def rollout_shares(self, batch: Batch) -> Tensor:
        return rollout_weights(batch.mean_R, batch.group_R, tau=self.tau, eps=self.eps)

    def token_shares(self, batch: Batch) -> Tensor:
        return _two_means(batch, _top(batch, batch.random_N(self.seed), self.p_visual), self.lam)


@dataclass(frozen=True)
class MaskTokens:
    """The masking probe: OPD with ceil(share·T) tokens of each response at zero and the rest renormalised inside the response.

    At least one token stays. A response without any advantage has no ranking and keeps all its tokens under every `which`, so that the
    three arms mask the same number of tokens.
    """

    which: Literal["top", "random", "lowest"] = "top"  # by advantage
    share: float = 0.1
    seed: int = 0  # read by "random" only; give every step its own

    def __post_init__(self) -> None:
        require_share("share", self.share)
        if self.which not in ("top", "random", "lowest"):
            raise ValueError(f"which must be 'top', 'random' or 'lowest', but is {self.which!r}.")

    def rollout_shares(self, batch: Batch) -> Tensor:
        return _siblings_alike(batch)

    def token_shares(self, batch: Batch) -> Tensor:
        score_N = {"top": batch.a_N, "lowest": -batch.a_N, "random": batch.random_N(self.seed)}[self.which]
        masked_R = _ceil_share(self.share, batch.length_R).minimum(batch.length_R - 1) * batch.depends_on_image_R
        kept_N = batch.rank_N(score_N) >= masked_R[batch.rollout_N]
        return kept_N / (batch.length_R - masked_R).double()[batch.rollout_N]


def advantage_for(weighting: Weighting, logp_original_N: Tensor, logp_degraded_N: Tensor, *, deadband: float = 1e-4) -> Tensor:
    """What this weighting ranks by: eq. 2, or the difference's size where `weighting.absolute`. As `visual_advantage`."""
    return visual_advantage(logp_original_N, logp_degraded_N, deadband=deadband, absolute=getattr(weighting, "absolute", False))


def _require_split(lam: float, p_visual: float) -> None:
    require_share("lam", lam, zero=True, one=True)
    require_share("p_visual", p_visual, one=True)


def rollout_weights(mean_R: Tensor, group_R: Tensor, *, tau: float = 1.0, eps: float = 1e-6) -> Tensor:
    """What each rollout weighs among its siblings, eq. 3-4 of arXiv 2605.21924.

    `z_k = (ā_k - μ) / (σ + ε)` with μ and the population standard deviation σ over the siblings; `w_k = softmax_k(z_k / τ)`.

    Args:
        mean_R: (R,) fp32 or fp64, nats. Mean advantage ā of each rollout.
        group_R: (R,) integers. The group of each rollout, any labels.
        tau: temperature of the softmax, > 0.
        eps: nats, > 0, keeps siblings of equal means at equal weights.

    Returns:
        w_R: (R,) in the dtype and on the device of mean_R, sums to 1 in each group, detached.

    Raises:
        ValueError: means that are not finite, not fp32 or fp64, different lengths, tau or eps not above 0.
    """
    require_positive(tau=tau, eps=eps)
    require_flat(mean_R=mean_R, group_R=group_R)
    require_same_length(mean_R=mean_R, group_R=group_R)
    require_integers(group_R=group_R)
    require_exact("mean_R", mean_R)
    require_finite("mean_R", mean_R, "Average the advantages of rollouts that have tokens.")
    groups, group_R = torch.unique(group_R.detach().cpu(), return_inverse=True)
    z_R = _z_scores(mean_R.detach().to("cpu", torch.float64), group_R, len(groups), eps) / tau
    top_B = torch.full((len(groups),), -math.inf, dtype=torch.float64).scatter_reduce_(0, group_R, z_R, "amax")
    e_R = (z_R - top_B[group_R]).exp()
    w_R = e_R / _segment_sum(e_R, group_R, len(groups))[group_R]
    return w_R.to(mean_R.device, mean_R.dtype)


def _z_scores(mean_R: Tensor, group_R: Tensor, groups: int, eps: float) -> Tensor:
    size_B = torch.bincount(group_R, minlength=groups)
    centred_R = mean_R - (_segment_sum(mean_R, group_R, groups) / size_B)[group_R]
    # Population, not sample: the K siblings are the whole set that is compared.
    std_B = (_segment_sum(centred_R.square(), group_R, groups) / size_B).sqrt()
    return centred_R / (std_B + eps)[group_R]


def token_coefficients(a_N: Tensor, rollout_N: Tensor, group_R: Tensor, weighting: Weighting) -> Tensor:
    """One coefficient per response token, so that the loss of a prompt is `Σ c_t · KL_t` (eq. 3-5 of arXiv 2605.21924).

    Whole groups in one call: siblings are compared with one another. Once known, the coefficients stay exact under any split of the
    tokens into micro-batches.

    Args:
        a_N: (N,) fp32 or fp64, nats, >= 0. Visual advantages.
        rollout_N: (N,) integers 0..R-1. The rollout of each token, in any order.
        group_R: (R,) integers. The group (prompt) of each rollout, any labels.
        weighting: VAOPD(), OPD(), RolloutOnly(), TokenOnly(), RandomTokens(), MaskTokens(), or any object with their two methods.

    Returns:
        c_N: (N,) in the dtype and on the device of a_N, sums to 1 in each group, detached.

    Raises:
        ValueError: advantages that are negative, not finite, not fp32 or fp64; indices outside 0..R-1; a rollout without tokens; different
            lengths; a weighting that is not one.
    """
    if isinstance(weighting, type) or not (hasattr(weighting, "rollout_shares") and hasattr(weighting, "token_shares")):
        raise ValueError(f"weighting must be an object such as VAOPD() or OPD(), but is {weighting!r}.")
    batch = _batch(a_N, rollout_N, group_R)
    c_N = weighting.rollout_shares(batch)[batch.rollout_N] * weighting.token_shares(batch)
    return c_N.to(a_N.device, a_N.dtype)


def visual_tokens(a_N: Tensor, rollout_N: Tensor, *, p_visual: float = 0.2) -> Tensor:
    """Membership in V_k, eq. 5: the max(1, ceil(p_visual·T)) tokens of largest advantage of each rollout, ties in token order.

    Args:
        a_N: (N,) fp32 or fp64, nats, >= 0.
        rollout_N: (N,) integers 0..R-1.
        p_visual: share in (0, 1].

    Returns:
        is_visual_N: (N,) bool on the device of a_N. All False in a rollout without an advantage above 0.

    Raises:
        ValueError: as token_coefficients.
    """
    require_share("p_visual", p_visual, one=True)
    require_integers(rollout_N=rollout_N)
    rollouts = int(rollout_N.max()) + 1 if rollout_N.numel() else 0
    batch = _batch(a_N, rollout_N, torch.zeros(rollouts, dtype=torch.long))
    return _top(batch, batch.a_N, p_visual).to(a_N.device)


def effective_rollouts(w_R: Tensor, group_R: Tensor) -> Tensor:
    """`1/Σ w²` of each group: how many equally weighted siblings would give the same variance, between 1 and K.

    Args:
        w_R: (R,) weights that sum to 1 in each group.
        group_R: (R,) integers, any labels.

    Returns:
        effective_B: (B,) float64 on the CPU, groups in ascending order of their label.

    Raises:
        ValueError: different lengths, weights that are not finite.
    """
    require_flat(w_R=w_R, group_R=group_R)
    require_same_length(w_R=w_R, group_R=group_R)
    require_integers(group_R=group_R)
    require_finite("w_R", w_R, "Take it from rollout_weights.")
    groups, group_R = torch.unique(group_R.detach().cpu(), return_inverse=True)
    return 1.0 / _segment_sum(w_R.detach().to("cpu", torch.float64).square(), group_R, len(groups))


def top_share(a_N: Tensor, share: float = 0.1) -> float:
    """Share of the advantage mass in the max(1, ceil(share·N)) tokens of largest advantage (the paper: 0.93 in the top 0.1).

    Args:
        a_N: (N,) nats, >= 0, the tokens of any number of rollouts together.
        share: in (0, 1].

    Returns:
        a share in [0, 1], or NaN where the mass is 0.

    Raises:
        ValueError: advantages that are negative or not finite, a share outside (0, 1].
    """
    require_share("share", share, one=True)
    a_N = _advantages(a_N)
    mass = a_N.sum()
    if mass == 0:
        return math.nan
    count = int(_ceil_share(share, torch.tensor(len(a_N))))
    return float(a_N.topk(count).values.sum() / mass)


def _advantages(a_N: Tensor) -> Tensor:
    require_flat(a_N=a_N)
    require_exact("a_N", a_N)
    require_finite("a_N", a_N, "Check the scores given to visual_advantage.")
    if (a_N < 0).any():
        raise ValueError(
            f"a_N must be >= 0, but its smallest value is {float(a_N.min())}. Take it from visual_advantage, which clips at 0 (eq. 2)."
        )
    return a_N.detach().to("cpu", torch.float64)


def _batch(a_N: Tensor, rollout_N: Tensor, group_R: Tensor) -> Batch:
    a64_N = _advantages(a_N)
    require_flat(rollout_N=rollout_N, group_R=group_R)
    require_same_length(a_N=a_N, rollout_N=rollout_N)
    require_integers(rollout_N=rollout_N, group_R=group_R)
    rollout_N, rollouts = rollout_N.detach().cpu().long(), len(group_R)
    low, high = (int(rollout_N.min()), int(rollout_N.max())) if len(rollout_N) else (0, -1)
    if low < 0 or high >= rollouts:
        raise ValueError(f"rollout_N must lie in 0..{rollouts - 1}, as group_R has {rollouts} rollouts, but runs from {low} to {high}.")
    batch = Batch(a64_N, rollout_N, torch.unique(group_R.detach().cpu(), return_inverse=True)[1])
    empty = (batch.length_R == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Every rollout must have a token, but rollouts {empty[:8]} have none. Drop them from group_R and renumber rollout_N."
        )
    return batch
