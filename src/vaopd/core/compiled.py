"""The elementwise part of the loss in one pass over memory, compiled by torch.compile: used on GPUs.

Between the products with the heads, the loss reads and writes chunks of logits about a dozen times; a GPU does nothing else meanwhile.
Compiled, both softmaxes, the divergence and its derivative are a few kernels. The plain operations stay the reference: the first chunk is
computed both ways, and a compiler that fails or differs is said so once and not used again. `TORCH_COMPILE_DISABLE=1` turns it off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .divergence import Divergence

log = logging.getLogger(__name__)

CHECKED_ROWS = 8  # of the first chunk
TOLERANCE = 1e-4  # of the largest number of each result; fp32 rounding in another order is 1e-6

Elementwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(measure: Divergence, student_nV: Tensor, teacher_nV: Tensor) -> tuple[Tensor, Tensor]:
    """((n,) divergence, (n, V) its derivative by the student's logits) from the logits of both; changes neither."""
    logq_nV, logp_nV = student_nV.log_softmax(-1), teacher_nV.log_softmax(-1)
    return measure.value_and_grad_(logq_nV, logp_nV, torch.empty_like(logq_nV))


class Compiled:
    """`plain`, compiled and checked.

    Args:
        measure: a divergence.
        compiler: what makes a function faster; by default torch.compile.
    """

    def __init__(self, measure: Divergence, compiler: Callable[[Any], Any] | None = None) -> None:
        def elementwise(student_nV: Tensor, teacher_nV: Tensor) -> tuple[Tensor, Tensor]:
            return plain(measure, student_nV, teacher_nV)

        self.plain: Elementwise = elementwise
        self.fast: Elementwise | None = (compiler or torch.compile)(elementwise)
        self.checked = False

    def __call__(self, student_nV: Tensor, teacher_nV: Tensor) -> tuple[Tensor, Tensor]:
        """As `plain`."""
        if not self.checked:
            return self._first(student_nV, teacher_nV)
        return (self.fast or self.plain)(student_nV, teacher_nV)

    def _first(self, student_nV: Tensor, teacher_nV: Tensor) -> tuple[Tensor, Tensor]:
        self.checked = True
        expected = self.plain(student_nV[:CHECKED_ROWS], teacher_nV[:CHECKED_ROWS])
        try:
            assert self.fast is not None
            found = self.fast(student_nV, teacher_nV)
            reason = _difference(expected, found)
        except Exception as error:  # whatever a compiler raises, the plain operations give the same numbers
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is None:
            return found
        self.fast = None
        log.warning("the loss is not compiled: %s. It is computed by plain operations: the same result, more slowly.", reason)
        return self.plain(student_nV, teacher_nV)


def _difference(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> str | None:
    """How far two results are apart, if further than rounding explains. NaN equals NaN: the caller's guard sees it either way."""
    for name, x, y in zip(("divergence", "derivative"), expected, found, strict=True):
        bound = TOLERANCE * float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()) if x.numel() else 0.0
        if not torch.allclose(y[: len(x)], x, rtol=TOLERANCE, atol=bound, equal_nan=True):
            return f"its {name} differs by {float((y[: len(x)] - x).abs().max()):.1e} (at most {bound:.0e})"
    return None


def elementwise_for(measure: Divergence, device: torch.device) -> Elementwise | None:
    """The compiled part where it pays; None: plain operations, on a CPU and for a divergence that can't be told from others."""
    return compiled(measure) if device.type == "cuda" and isinstance(measure, Hashable) else None


@lru_cache(maxsize=8)
def compiled(measure: Divergence) -> Compiled:
    """One per divergence, so that it is compiled and checked once in a run."""
    return Compiled(measure)
