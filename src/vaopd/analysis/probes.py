"""Probes on tensors and records: where the advantage and the divergence sit, and what depends on the image. Nothing here runs a model.

`vaopd.analysis.probe_models` measures the inputs on a pair of models; `evaluate.runner.mass_curve` is the probe of concentration.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vaopd.core import Head, MaskTokens, Weighting, effective_rollouts, token_coefficients
from vaopd.core.head import Projection, chunks, default_chunk, wide_dtype

Which = Literal["top", "random", "lowest"]
ARMS: tuple[Which, ...] = ("top", "random", "lowest")
CLASSES = ("number", "word", "punctuation", "other")


def share_of(is_member_N: Tensor, **columns_N: Tensor) -> dict[str, float | None]:
    """What share of the tokens, and of the sum of each column, the member tokens have; None where a sum is 0.

    Args:
        is_member_N: (N,) bool.
        columns_N: (N,) numbers >= 0 each, such as the divergence in nats.
    """
    member_N = is_member_N.cpu()
    of = {"tokens": torch.ones(len(member_N), dtype=torch.float64), **{name: x_N.double().cpu() for name, x_N in columns_N.items()}}
    return {name: float(x_N[member_N].sum() / x_N.sum()) if x_N.sum() > 0 else None for name, x_N in of.items()}


def masked_tokens(a_N: Tensor, rollout_N: Tensor, group_R: Tensor, which: Which, *, share: float = 0.1, seed: int = 0) -> Tensor:
    """(N,) bool: the tokens that the weighting `mask_tokens` takes out of the loss, chosen by its own rule inside each response.

    Args and raises: as `vaopd.core.token_coefficients`; `which` and `share` as `vaopd.core.MaskTokens`.
    """
    return token_coefficients(a_N, rollout_N, group_R, MaskTokens(which, share, seed)) == 0


def masking(
    a_N: Tensor, kl_N: Tensor, rollout_N: Tensor, group_R: Tensor, *, share: float = 0.1, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """What each arm of the paper's masking experiment takes away: its share of the tokens, of the divergence, of the advantage.

    This is the half that needs no training. How much accuracy the same masks cost is measured by training with
    `method: {mask_tokens: {which: top}}`, `random` and `lowest` (arXiv 2605.21924: -2.9, -0.3 and ±0.1 points).

    Args:
        a_N: (N,) visual advantages, nats, >= 0.
        kl_N: (N,) divergence of student and teacher, nats.
        rollout_N, group_R: the layout, as for `vaopd.core.token_coefficients`.

    Returns:
        top | random | lowest -> {"tokens", "kl", "va"}, each a share in [0, 1] or None where there is nothing to share.
    """
    masks = {which: masked_tokens(a_N, rollout_N, group_R, which, share=share, seed=seed) for which in ARMS}
    return {which: share_of(mask_N, kl=kl_N, va=a_N) for which, mask_N in masks.items()}


def split_mean(x_N: Tensor, is_visual_N: Tensor) -> dict[str, float | None]:
    """The mean of a column over all tokens, over the visual ones and over the others; None over no tokens."""
    x_N, visual_N = x_N.double().cpu(), is_visual_N.cpu()
    parts = {"all": x_N, "visual": x_N[visual_N], "other": x_N[~visual_N]}
    return {name: float(part.mean()) if len(part) else None for name, part in parts.items()}


def token_class(text: str) -> str:
    """`number`: has a digit. `word`: has a letter. `punctuation`: only punctuation and symbols. `other`: spaces, control tokens, parts."""
    plain = text.strip()
    if not plain or "\ufffd" in plain or (plain.startswith("<|") and plain.endswith("|>")):
        return "other"
    if any(c.isdigit() for c in plain):
        return "number"
    if any(c.isalpha() for c in plain):
        return "word"
    return "punctuation" if all(unicodedata.category(c)[0] in "PS" for c in plain) else "other"


def by_class(texts: Sequence[str], **columns_N: Tensor) -> dict[str, dict[str, float | None]]:
    """Shares of the tokens and of each column by `token_class`; the classes that occur, in the order of `CLASSES`."""
    classes = [token_class(text) for text in texts]
    present = [name for name in CLASSES if name in classes]
    return {name: share_of(torch.tensor([c == name for c in classes]), **columns_N) for name in present}


def effective(a_N: Tensor, rollout_N: Tensor, group_R: Tensor, weighting: Weighting) -> dict[str, float]:
    """How many siblings of a prompt really count under a weighting, 1/Σ w²: the mean over prompts, and the smallest."""
    c_N = token_coefficients(a_N, rollout_N, group_R, weighting).double().cpu()
    w_R = torch.zeros(len(group_R), dtype=torch.float64).index_add_(0, rollout_N.cpu(), c_N)
    effective_B = effective_rollouts(w_R, group_R)
    return {"mean": float(effective_B.mean()), "min": float(effective_B.min())}


@torch.no_grad()
def next_token_entropy(hidden_NH: Tensor, head: Head, *, chunk: int | None = None) -> Tensor:
    """(N,) nats: the entropy of the next token over the tokenizer's ids at temperature 1, never holding an N×V tensor.

    Args:
        hidden_NH: (N, H) post-final-norm states.
        chunk: rows at a time; None: as the fused loss.
    """
    dtype = wide_dtype(hidden_NH, head.weight_VH)
    projection = Projection(head, head.size, hidden_NH, dtype)
    entropy_N = torch.empty(len(hidden_NH), dtype=dtype, device=hidden_NH.device)
    for rows in chunks(len(hidden_NH), chunk or default_chunk(head.size, hidden_NH.device)):
        logp_nV = projection.logits(hidden_NH[rows]).log_softmax(-1)
        entropy_N[rows] = -(logp_nV.exp() * logp_nV).sum(-1)
    return entropy_N


def repetition(ids_T: Tensor, n: int = 4) -> float:
    """Share of a response's n-grams that occurred in it before; 0 for a response of fewer than n tokens."""
    ids = ids_T.tolist()
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def reliance(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """What a model's accuracy owes to the image, from its entry of `eval.json`: seeing minus degraded, seeing minus removed.

    None where one of the two was not measured. Every question must have a picture: blind accuracies are over those that do.
    """
    seeing = entry.get("accuracy")
    blind = {name: entry.get(f"blind_{name}") for name in ("degraded", "removed")}
    lost = {f"lost_{name}": None if seeing is None or value is None else seeing - value for name, value in blind.items()}
    return {"seeing": seeing, **blind, **lost}
