"""The numbers of a step, as `docs/run_folder.md` names them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vaopd.core import effective_rollouts, top_share
from vaopd.types import Group

Metrics = dict[str, Any]

# What a step without a rollout, or with scores that are not finite, has no numbers for.
UNMEASURED: Metrics = dict.fromkeys(("loss", "kl", "va", "va_top10", "effective_rollouts", "grad_norm"))


def rollout_metrics(rollouts: Sequence[Group], groups: Sequence[Group]) -> Metrics:
    """What was generated (`rollouts`) and what of it is left to train on (`groups`); everything else is None until it is measured."""
    lengths = [length for group in groups for length in group.lengths]
    ended = [ended for group in groups for ended in group.ended_K]
    return {
        "tokens": mean(lengths),
        "truncated": None if not ended else 1 - sum(ended) / len(ended),
        "empty": sum(len(group.responses) for group in rollouts) - len(lengths),
        "skipped_prompts": len(rollouts) - len(groups),
        "text_only": sum(not group.prompt.images for group in rollouts),
        "nonfinite": 0,
        **UNMEASURED,
    }


def weight_metrics(groups: Sequence[Group], c_N: Tensor) -> Metrics:
    """How many rollouts of a prompt really count, on average."""
    lengths = [length for group in groups for length in group.lengths]
    w_R = torch.stack([part.sum() for part in c_N.split(lengths)])
    group_R = torch.tensor([index for index, group in enumerate(groups) for _ in group.responses])
    return {"effective_rollouts": float(effective_rollouts(w_R, group_R).mean())}


def score_metrics(kl_N: Tensor | None, a_N: Tensor | None) -> Metrics:
    """Means over tokens; None for what the method does not compute."""
    share = None if a_N is None else top_share(a_N)
    return {
        "kl": None if kl_N is None else float(kl_N.mean()),
        "va": None if a_N is None else float(a_N.mean()),
        "va_top10": None if share is None or math.isnan(share) else share,
    }


def gap_metrics(groups: Sequence[Group], logp_N: Tensor | None) -> Metrics:
    """How far the server that sampled is from the model that is trained, in log p(y_t) of the same tokens; {} where none sampled."""
    served = [group.served_logp_N for group in groups if group.served_logp_N is not None]
    if logp_N is None or len(served) < len(groups):
        return {}
    gap_N = (torch.cat(served) - logp_N).abs()
    return {"sampler_gap": float(gap_N.mean()), "sampler_gap_max": float(gap_N.max()), "sampler_ratio": float(gap_N.mean().exp())}


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None
