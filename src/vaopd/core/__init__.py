"""The method as pure functions on tensors, usable inside anybody's trainer. Needs torch and nothing else of this package.

    a_N = visual_advantage(logp_original_N, logp_degraded_N)                            eq 2
    c_N = token_coefficients(a_N, rollout_N, group_R, VAOPD())                          eq 3-5
    loss, kl_N = fused_weighted_divergence(student_hidden_NH, student_head,
                     teacher_hidden_NG, teacher_head, c_N, normalizer=prompts)          eq 1, 6

Shape letters: N response tokens of a call, flat and ragged; R rollouts; B groups (prompts); V vocabulary; H, G hidden sizes of student
and teacher. Equations are those of arXiv 2605.21924.
"""

from .advantage import visual_advantage
from .divergence import JSD, Divergence, ForwardKL, ReverseKL, as_divergence, from_padded, token_divergence, token_log_probs
from .fused import fused_weighted_divergence
from .head import Head
from .weighting import (
    OPD,
    VAOPD,
    Batch,
    MaskTokens,
    RandomTokens,
    RolloutOnly,
    TokenOnly,
    Weighting,
    advantage_for,
    effective_rollouts,
    rollout_weights,
    token_coefficients,
    top_share,
    visual_tokens,
)

__all__ = [
    "JSD",
    "OPD",
    "VAOPD",
    "Batch",
    "Divergence",
    "ForwardKL",
    "Head",
    "MaskTokens",
    "RandomTokens",
    "ReverseKL",
    "RolloutOnly",
    "TokenOnly",
    "Weighting",
    "advantage_for",
    "as_divergence",
    "effective_rollouts",
    "from_padded",
    "fused_weighted_divergence",
    "rollout_weights",
    "token_coefficients",
    "token_divergence",
    "token_log_probs",
    "top_share",
    "visual_advantage",
    "visual_tokens",
]
