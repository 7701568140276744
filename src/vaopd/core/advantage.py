"""Eq. 2 of arXiv 2605.21924: how much the teacher's score of a token depends on the image."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import require_exact, require_finite, require_flat, require_same_length


def visual_advantage(logp_original_N: Tensor, logp_degraded_N: Tensor, *, deadband: float = 1e-4, absolute: bool = False) -> Tensor:
    """`a_t = max(log p_T(y_t | v, q, y_<t) - log p_T(y_t | ṽ, q, y_<t), 0)`, eq. 2 of arXiv 2605.21924.

    Args:
        logp_original_N: (N,) fp32, nats. The teacher's log-probability of each sampled token given the original image, at temperature 1.
        logp_degraded_N: (N,) fp32, nats. The same given the degraded image.
        absolute: the difference's size instead of its positive part (not in the paper): also where the image speaks against the token.
        deadband: nats; an advantage below it counts as 0. Two exact computations of one score differ by about 1e-6 in fp32, and both the
            top-share cut and the z-score over siblings would turn that noise into different weights. 0 turns it off.

    Returns:
        a_N: (N,) nats, >= 0, detached.

    Raises:
        ValueError: scores that are not finite, not fp32 or fp64, or of different lengths; a negative deadband.
    """
    if not 0 <= deadband < float("inf"):
        raise ValueError(f"deadband is a size in nats and must be >= 0, but is {deadband}. Use 0 to turn it off.")
    scores = {"logp_original_N": logp_original_N, "logp_degraded_N": logp_degraded_N}
    require_flat(**scores)
    require_same_length(**scores)
    for name, logp_N in scores.items():
        require_exact(name, logp_N)
        require_finite(name, logp_N, "Check the teacher's forward under that view.")
    difference_N = logp_original_N.detach() - logp_degraded_N.detach()
    a_N = difference_N.abs() if absolute else difference_N.clamp(min=0.0)
    return torch.where(a_N < deadband, 0.0, a_N)
