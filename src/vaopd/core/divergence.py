"""Eq. 1 of arXiv 2605.21924: log-probabilities and divergences over the whole vocabulary, in a form to read and to check against.

`vaopd.core.fused` computes the same without a tensor of N×V.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ._checks import refuse_create_graph, require_finite, require_integers, require_positive, require_same_length
from .head import Head, HeadGradients, Projection, chunks, default_chunk, no_autocast, wide_dtype


class Divergence(Protocol):
    """The seam for a new divergence: its value, and its value with the derivative by the student's logits.

    `logq_NV` (student) and `logp_NV` (teacher) are log-probabilities, normalised over V. With `g` the derivative of the value by logq_NV,
    the derivative by the logits is `g - q Σ_v g`.
    """

    def value(self, logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
        """(N,) nats, >= 0, differentiable."""
        ...

    def value_and_grad_(self, logq_NV: Tensor, logp_NV: Tensor, scratch_NV: Tensor) -> tuple[Tensor, Tensor]:
        """((N,) value, (N, V) derivative by the student's logits); may overwrite all three, and return one of them."""
        ...


@dataclass(frozen=True)
class ReverseKL:
    """`KL(student ‖ teacher) = Σ q (log q - log p)`, eq. 1; derivative by the logits `q (log q - log p - KL)`."""

    def value(self, logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
        return (logq_NV.exp() * (logq_NV - logp_NV)).sum(-1)

    def value_and_grad_(self, logq_NV: Tensor, logp_NV: Tensor, scratch_NV: Tensor) -> tuple[Tensor, Tensor]:
        ratio_NV = torch.sub(logq_NV, logp_NV, out=logp_NV)
        q_NV = logq_NV.exp_()
        kl_N = torch.mul(q_NV, ratio_NV, out=scratch_NV).sum(-1)  # vecdot would allocate the product
        # Without centring every logit of a row would shift by q · KL: the softmax makes that part of the derivative vanish.
        ratio_NV -= kl_N[:, None]
        ratio_NV *= q_NV
        return kl_N, ratio_NV


@dataclass(frozen=True)
class ForwardKL:
    """`KL(teacher ‖ student) = Σ p (log p - log q)`; derivative by the logits `q - p`."""

    def value(self, logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
        return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)

    def value_and_grad_(self, logq_NV: Tensor, logp_NV: Tensor, scratch_NV: Tensor) -> tuple[Tensor, Tensor]:
        p_NV = torch.exp(logp_NV, out=scratch_NV)
        ratio_NV = torch.sub(logp_NV, logq_NV, out=logp_NV)
        q_NV = logq_NV.exp_()
        grad_NV = q_NV.sub_(p_NV)
        return ratio_NV.mul_(p_NV).sum(-1), grad_NV


@dataclass(frozen=True)
class JSD:
    """The generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649), `JSD_β(P‖Q) = β KL(P‖M) + (1-β) KL(Q‖M)`, `M = βP + (1-β)Q`.

    P is the teacher and Q the student. Near β = 0 it is β · KL(teacher‖student), near β = 1 it is (1-β) · KL(student‖teacher).
    Derivative by the logits: `(1-β) q (log q - log m - KL(Q‖M))`.
    """

    beta: float = 0.5  # weight of the teacher in the mixture

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta of JSD must lie in (0, 1), but is {self.beta}. Use 'forward_kl' for the limit 0 and 'reverse_kl' for the limit 1."
            )

    def value(self, logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
        logm_NV = torch.logaddexp(logq_NV + math.log1p(-self.beta), logp_NV + math.log(self.beta))
        teacher_N = (logp_NV.exp() * (logp_NV - logm_NV)).sum(-1)
        student_N = (logq_NV.exp() * (logq_NV - logm_NV)).sum(-1)
        return self.beta * teacher_N + (1 - self.beta) * student_N

    def value_and_grad_(self, logq_NV: Tensor, logp_NV: Tensor, scratch_NV: Tensor) -> tuple[Tensor, Tensor]:
        log_student_weight, log_teacher_weight = math.log1p(-self.beta), math.log(self.beta)
        logm_NV = torch.add(logp_NV, log_teacher_weight - log_student_weight, out=scratch_NV)
        logm_NV = torch.logaddexp(logq_NV, logm_NV, out=logm_NV).add_(log_student_weight)
        p_NV = logp_NV.exp()
        teacher_N = p_NV.mul_(logp_NV.sub_(logm_NV)).sum(-1)
        ratio_NV = torch.sub(logq_NV, logm_NV, out=logm_NV)
        q_NV = logq_NV.exp_()
        student_N = torch.mul(q_NV, ratio_NV, out=logp_NV).sum(-1)
        ratio_NV -= student_N[:, None]
        ratio_NV *= q_NV.mul_(1 - self.beta)
        return self.beta * teacher_N + (1 - self.beta) * student_N, ratio_NV


_NAMED: dict[str, type[Any]] = {"reverse_kl": ReverseKL, "forward_kl": ForwardKL, "jsd": JSD}


def as_divergence(spec: str | Divergence) -> Divergence:
    """`"reverse_kl"`, `"forward_kl"`, `"jsd"` (β = 0.5), `"jsd:0.3"`, or an object with the two methods of Divergence.

    Raises:
        ValueError: an unknown name, with the nearest known one; a β outside (0, 1).
    """
    if not isinstance(spec, str):
        if isinstance(spec, type) or not (hasattr(spec, "value") and hasattr(spec, "value_and_grad_")):
            raise ValueError(f"divergence must be a name or an object such as JSD(0.3), but is {spec!r}.")
        return spec
    name, _, beta = spec.partition(":")
    if name not in _NAMED or (beta and name != "jsd"):
        near = difflib.get_close_matches(name, _NAMED, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"divergence must be 'reverse_kl', 'forward_kl', 'jsd' or 'jsd:BETA', but is {spec!r}.{hint}")
    if not beta:
        return _NAMED[name]()
    try:
        return JSD(float(beta))
    except ValueError as error:
        raise ValueError(f"divergence {spec!r}: the part after 'jsd:' must be a number in (0, 1), such as 'jsd:0.3'.") from error


def common_vocabulary(student_head: Head, teacher_head: Head) -> int:
    """How many ids both distributions are normalised over: the tokenizer's, never the padding of either head.

    Raises:
        ValueError: two different vocab_size, a head with fewer rows than the other's vocab_size, or different widths and no vocab_size.
    """
    declared = {head.vocab_size for head in (student_head, teacher_head) if head.vocab_size is not None}
    rows = len(student_head.weight_VH), len(teacher_head.weight_VH)
    if not declared and rows[0] != rows[1]:
        raise ValueError(
            f"Student and teacher must share one vocabulary, but their heads have {rows[0]} and {rows[1]} rows and neither a vocab_size. "
            "Set vocab_size=len(tokenizer) on both heads."
        )
    if len(declared) > 1:
        raise ValueError(
            f"Student and teacher must share one vocabulary, but vocab_size is {student_head.vocab_size} and {teacher_head.vocab_size}."
        )
    size = declared.pop() if declared else rows[0]
    if size > min(rows):
        raise ValueError(f"vocab_size is {size}, but the heads have {rows[0]} and {rows[1]} rows: the smaller one does not know all ids.")
    return size


def require_hidden(name: str, hidden_NH: Tensor, head: Head) -> None:
    """Raises ValueError unless `hidden_NH` is flat and fits the head."""
    width = head.weight_VH.shape[1]
    if hidden_NH.ndim != 2 or hidden_NH.shape[1] != width:
        raise ValueError(
            f"{name} must be (N, {width}), one row per response token and as wide as its head, but has shape {tuple(hidden_NH.shape)}. "
            "Use from_padded(hidden_RTH, mask_RT) to drop the padding."
        )


def require_pair(student_hidden_NH: Tensor, student_head: Head, teacher_hidden_NG: Tensor, teacher_head: Head) -> int:
    """Checks both sides of a divergence and returns their common vocabulary."""
    require_hidden("student_hidden_NH", student_hidden_NH, student_head)
    require_hidden("teacher_hidden_NG", teacher_hidden_NG, teacher_head)
    require_same_length(student_hidden_NH=student_hidden_NH, teacher_hidden_NG=teacher_hidden_NG)
    require_finite(
        "teacher_hidden_NG", teacher_hidden_NG, "Check the teacher's forward and its dtype (fp16 overflows where bf16 does not)."
    )
    return common_vocabulary(student_head, teacher_head)


def token_divergence(
    student_hidden_NH: Tensor,
    student_head: Head,
    teacher_hidden_NG: Tensor,
    teacher_head: Head,
    *,
    divergence: str | Divergence = "reverse_kl",
) -> Tensor:
    """Divergence of student and teacher at every response token, over the full vocabulary: KL_t of eq. 1, arXiv 2605.21924.

    The reference form: holds several N×V tensors. Training uses fused_weighted_divergence.

    Args:
        student_hidden_NH: (N, H) post-final-norm states that predict the tokens.
        student_head: differentiable, as are its hidden states.
        teacher_hidden_NG: (N, G), given the original image.
        teacher_head: gets no gradient, nor do its hidden states.
        divergence: see as_divergence; the default is KL(student ‖ teacher).

    Returns:
        kl_N: (N,) nats, fp32 (fp64 where an operand is), temperature 1.

    Raises:
        ValueError: shapes or vocabularies that do not fit, teacher states that are not finite, an unknown divergence.
    """
    measure = as_divergence(divergence)
    vocab = require_pair(student_hidden_NH, student_head, teacher_hidden_NG, teacher_head)
    dtype = wide_dtype(student_hidden_NH, student_head.weight_VH, teacher_hidden_NG, teacher_head.weight_VH)
    logq_NV = replace(student_head, vocab_size=vocab).logits(student_hidden_NH, dtype).log_softmax(-1)
    with torch.no_grad():
        logp_NV = replace(teacher_head, vocab_size=vocab).logits(teacher_hidden_NG, dtype).log_softmax(-1)
    return measure.value(logq_NV, logp_NV)


def token_log_probs(hidden_NH: Tensor, head: Head, ids_N: Tensor, *, chunk: int | None = None) -> Tensor:
    """Log-probability of each response token at temperature 1, without an N×V tensor in forward or backward.

    Differentiable by the hidden states and by the head's weight and bias: the negative log-likelihood is `-token_log_probs(...)`. The
    backward computes each chunk's logits again instead of keeping them.

    Args:
        hidden_NH: (N, H) post-final-norm states; row i predicts ids_N[i].
        head: normalised over its `size` ids.
        ids_N: (N,) integers below head.size.
        chunk: rows at a time; None: see default_chunk.

    Returns:
        logp_N: (N,) nats, fp32 (fp64 where an operand is).

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary, a chunk not above 0.
    """
    require_hidden("hidden_NH", hidden_NH, head)
    require_integers(ids_N=ids_N)
    if ids_N.ndim != 1 or len(ids_N) != len(hidden_NH):
        raise ValueError(f"ids_N must have one id per row of hidden_NH ({len(hidden_NH)}), but has shape {tuple(ids_N.shape)}.")
    if ids_N.numel() and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < head.size:
        raise ValueError(
            f"ids_N must lie in 0..{head.size - 1}, the tokenizer's ids, but runs from {int(ids_N.min())} to {int(ids_N.max())}."
        )
    require_positive(chunk=1 if chunk is None else chunk)
    rows = chunk or default_chunk(head.size, hidden_NH.device)
    return _TokenLogProbs.apply(hidden_NH, head.weight_VH, head.bias_V, head, ids_N.long(), rows)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, head: Head, ids_N: Tensor, chunk: int) -> Tensor:
        dtype = wide_dtype(hidden_NH, weight_VH)
        logp_N = hidden_NH.new_empty(len(ids_N), dtype=dtype)
        lse_N = torch.empty_like(logp_N)
        with no_autocast(hidden_NH):
            projection = Projection(head, head.size, hidden_NH, dtype)
            for rows in chunks(len(ids_N), chunk):
                z_nV = projection.logits(hidden_NH[rows])
                lse_N[rows] = z_nV.logsumexp(-1)
                logp_N[rows] = z_nV.gather(-1, ids_N[rows, None])[:, 0] - lse_N[rows]
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, ids_N, lse_N)
        ctx.head, ctx.chunk = head, chunk
        return logp_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("token_log_probs")
        hidden_NH, weight_VH, bias_V, ids_N, lse_N = ctx.saved_tensors
        head = replace(ctx.head, weight_VH=weight_VH, bias_V=bias_V)
        with no_autocast(hidden_NH):
            projection = Projection(head, head.size, hidden_NH, lse_N.dtype)
            gradients = HeadGradients(projection, hidden_NH, head, ctx.needs_input_grad[:3])
            for rows in chunks(len(ids_N), ctx.chunk):
                z_nV = projection.logits(hidden_NH[rows])
                slope_nV = projection.slope(z_nV)
                # d log p(y) / d z = onehot(y) - p
                grad_nV = z_nV.sub_(lse_N[rows, None]).exp_().neg_()
                grad_nV.scatter_add_(-1, ids_N[rows, None], torch.ones_like(grad_nV[:, :1]))
                gradients.add(rows, hidden_NH[rows], grad_nV, slope_nV, grad_N[rows])
        return *gradients.results(), None, None, None


def from_padded(x_RT: Tensor, mask_RT: Tensor) -> tuple[Tensor, Tensor]:
    """The flat, ragged layout of a padded tensor, for trainers that pad.

    Args:
        x_RT: (R, T) or (R, T, …) anything per token.
        mask_RT: (R, T) True at response tokens (the first EOS included, nothing after it); padding on either side.

    Returns:
        (x_N, rollout_N): (N,) or (N, …) the tokens in order, and the row of each.

    Raises:
        ValueError: shapes that do not fit, a mask that is not 0/1, a row without a token.
    """
    if mask_RT.ndim != 2 or x_RT.shape[:2] != mask_RT.shape:
        raise ValueError(
            f"mask_RT must be (R, T) like the leading dimensions of x_RT, but the shapes are {tuple(mask_RT.shape)}, {tuple(x_RT.shape)}."
        )
    keep_RT = mask_RT.bool()
    if mask_RT.dtype != torch.bool and (mask_RT != keep_RT).any():
        raise ValueError("mask_RT must hold 0 and 1 only. Pass the response mask, not weights or positions.")
    empty = (~keep_RT.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Every rollout must have a token, but rows {empty[:8]} have none. Drop these rows from every tensor first.")
    return x_RT[keep_RT], keep_RT.nonzero()[:, 0]
