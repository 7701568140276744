"""Eq. 6 of arXiv 2605.21924 without an N×V tensor: loss and gradient in one pass over chunks of rows.

The coefficients are known before the loss, so the gradient with respect to a chunk's logits can be formed as soon as its logits exist
and be multiplied through the head at once. What stays are the gradients of the hidden states (N×H) and of the head (V×H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import refuse_create_graph, require_exact, require_finite, require_flat, require_positive, require_same_length
from .compiled import elementwise_for
from .divergence import Divergence, as_divergence, require_pair
from .head import Head, HeadGradients, Projection, chunks, default_chunk, no_autocast, wide_dtype


def fused_weighted_divergence(
    student_hidden_NH: Tensor,
    student_head: Head,
    teacher_hidden_NG: Tensor,
    teacher_head: Head,
    c_N: Tensor,
    *,
    normalizer: float = 1.0,
    divergence: str | Divergence = "reverse_kl",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`Σ c_t · KL_t / normalizer`, eq. 6 of arXiv 2605.21924, with the gradient formed chunk by chunk in the forward.

    Call it inside the wrapped forward (DDP, FSDP2), with the head's whole weight. N = 0 gives a loss of 0 that still has a graph, so a
    process without rollouts can join the backward. A student that is not finite gives a loss that is not finite, for the caller's guard
    to see; everything else that is not finite is refused.

    Args:
        student_hidden_NH: (N, H) post-final-norm states that predict the response tokens.
        student_head: gradients reach its weight and bias where they require grad; a frozen head costs no V×H buffer.
        teacher_hidden_NG: (N, G), given the original image; never gets a gradient.
        teacher_head: its rows beyond the common vocabulary are left out, as are the student's.
        c_N: (N,) fp32 or fp64, from token_coefficients; no gradient. Keep it out of FSDP's input cast.
        normalizer: prompts of the whole step, over all processes and micro-batches, that still have a rollout.
        divergence: see as_divergence; the default is KL(student ‖ teacher).
        chunk: rows at a time; None: see default_chunk.

    Returns:
        (loss, kl_N): a scalar, and (N,) nats detached; fp32 (fp64 where an operand is). Differentiable once.

    Raises:
        ValueError: coefficients that require grad or are not finite, teacher states that are not finite, different lengths, shapes or
            vocabularies that do not fit, an unknown divergence, a normalizer or chunk not above 0.
    """
    measure = as_divergence(divergence)
    vocab = require_pair(student_hidden_NH, student_head, teacher_hidden_NG, teacher_head)
    _require_coefficients(c_N, student_hidden_NH)
    require_positive(normalizer=normalizer, chunk=1 if chunk is None else chunk)
    rows = chunk or default_chunk(vocab, student_hidden_NH.device)
    sweep = _Sweep(student_head, teacher_hidden_NG.detach(), teacher_head, c_N, float(normalizer), measure, vocab, rows)
    return _FusedDivergence.apply(student_hidden_NH, student_head.weight_VH, student_head.bias_V, sweep, torch.is_grad_enabled())


def _require_coefficients(c_N: Tensor, student_hidden_NH: Tensor) -> None:
    require_flat(c_N=c_N)
    require_same_length(c_N=c_N, student_hidden_NH=student_hidden_NH)
    require_exact("c_N", c_N)
    if c_N.requires_grad:
        raise ValueError("c_N must not require grad: the gradient is formed for constant coefficients. Pass c_N.detach().")
    require_finite("c_N", c_N, "Take it from token_coefficients.")


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The constant side of the loss, and the one pass over the rows."""

    student_head: Head
    teacher_hidden_NG: Tensor
    teacher_head: Head
    c_N: Tensor
    normalizer: float
    measure: Divergence
    vocab: int
    chunk: int

    def run(self, hidden_NH: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """(loss, kl_N, gradients by hidden states, weight and bias); `needs` says which of the gradients to form."""
        with no_autocast(hidden_NH):
            return self._run(hidden_NH, needs)

    def _run(self, hidden_NH: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        dtype = wide_dtype(hidden_NH, self.student_head.weight_VH, self.teacher_hidden_NG, self.teacher_head.weight_VH)
        student = Projection(self.student_head, self.vocab, hidden_NH, dtype)
        teacher = Projection(self.teacher_head, self.vocab, self.teacher_hidden_NG, dtype)
        gradients = HeadGradients(student, hidden_NH, self.student_head, needs) if any(needs) else None
        c_N = self.c_N.to(hidden_NH.device, dtype) / self.normalizer
        kl_N = torch.empty_like(c_N)
        compiled = elementwise_for(self.measure, hidden_NH.device) if gradients else None
        # Buffers for the whole pass: freed and allocated anew per chunk, blocks of this size leave holes that double the peak.
        buffers = kl_N.new_empty(2 if compiled else 3, min(self.chunk, len(kl_N)), self.vocab)
        for rows in chunks(len(kl_N), self.chunk):
            hidden_nH, teacher_nG = hidden_NH[rows], self.teacher_hidden_NG[rows]
            z_nV, other_nV, *third = buffers[:, : len(hidden_nH)]
            student.logits(hidden_nH, out=z_nV)
            slope_nV = student.slope(z_nV) if gradients else None
            if compiled and gradients:
                kl_N[rows], grad_nV = compiled(z_nV, teacher.logits(teacher_nG, out=other_nV))
            else:
                logq_nV = torch.log_softmax(z_nV, -1, out=other_nV)
                logp_nV = torch.log_softmax(teacher.logits(teacher_nG, out=z_nV), -1, out=third[0])
                if gradients is None:
                    kl_N[rows] = self.measure.value(logq_nV, logp_nV)
                    continue
                kl_N[rows], grad_nV = self.measure.value_and_grad_(logq_nV, logp_nV, z_nV)
            gradients.add(rows, hidden_nH, grad_nV, slope_nV, c_N[rows])
        return (c_N * kl_N).sum(), kl_N, gradients.results() if gradients else (None, None, None)


class _FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, sweep: _Sweep, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = (need and grad_enabled for need in ctx.needs_input_grad[:3])
        ctx.sweep, ctx.needs = sweep, (hidden, weight, bias)
        loss, kl_N, ctx.gradients = sweep.run(hidden_NH, ctx.needs)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        ctx.mark_non_differentiable(kl_N)
        return loss, kl_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph("fused_weighted_divergence")
        # The first walk gives the buffers away, as a scaled copy would double the largest of them (V×H) at the peak of a step.
        # A retained graph that is walked again computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = ctx.sweep.run(ctx.saved_tensors[0], ctx.needs)[2]
        return *(None if g is None else g.mul_(grad_loss) for g in gradients), None, None
