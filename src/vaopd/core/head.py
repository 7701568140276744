"""A language-model head as data, and its products with chunks of hidden states and of logit gradients.

Precision: logits are formed in at least fp32, also where the caller's autocast or a half-precision weight would round them. Two bf16
operands on a GPU go through the tensor cores with fp32 output, which is exact in the products; everything else is cast up first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import is_dtensor, require_positive


@dataclass(frozen=True, eq=False)
class Head:
    """`logits = softcap · tanh(scale · (hidden Wᵀ + bias) / softcap)` over the tokenizer's ids.

    Built from the tensors that the model uses in this forward, so that their gradient is the model's. Under FSDP2 build it inside the
    root's forward, where the weight is whole.

    Raises ValueError for sharded tensors (DTensor), shapes that do not fit, and a vocab_size larger than the weight.
    """

    weight_VH: Tensor  # (V or more, H); rows from vocab_size on are padding and carry no probability
    bias_V: Tensor | None = None  # one entry per row of weight_VH
    scale: float = 1.0
    softcap: float | None = None  # None: no cap
    vocab_size: int | None = None  # the tokenizer's ids; None: all rows

    def __post_init__(self) -> None:
        if self.weight_VH.ndim != 2:
            raise ValueError(f"weight_VH must be (V, H), but has shape {tuple(self.weight_VH.shape)}. Pass lm_head.weight as it is.")
        if is_dtensor(self.weight_VH) or is_dtensor(self.bias_V):
            raise ValueError(
                "The head's tensors are sharded (DTensor), and their full_tensor() would keep only this rank's gradient. "
                "Build the Head inside the forward of the FSDP root group, where they are whole."
            )
        rows = self.weight_VH.shape[0]
        if self.bias_V is not None and self.bias_V.shape != (rows,):
            raise ValueError(f"bias_V must have one entry per row of weight_VH ({rows}), but has shape {tuple(self.bias_V.shape)}.")
        if self.vocab_size is not None and not 0 < self.vocab_size <= rows:
            raise ValueError(f"vocab_size must lie in 1..{rows}, the rows of weight_VH, but is {self.vocab_size}. Use len(tokenizer).")
        require_positive(scale=self.scale)
        if self.softcap is not None:
            require_positive(softcap=self.softcap)

    @property
    def size(self) -> int:
        """Ids that carry probability."""
        return self.weight_VH.shape[0] if self.vocab_size is None else self.vocab_size

    def logits(self, hidden_NH: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(N, size) logits in fp32 (fp64 where an operand is), differentiable; one N×V tensor and more."""
        dtype = dtype or wide_dtype(hidden_NH, self.weight_VH)
        with no_autocast(hidden_NH):
            z_NV = hidden_NH.to(dtype) @ self.weight_VH[: self.size].to(dtype).T
            if self.bias_V is not None:
                z_NV = z_NV + self.bias_V[: self.size].to(dtype)
            z_NV = z_NV * self.scale
            return z_NV if self.softcap is None else self.softcap * torch.tanh(z_NV / self.softcap)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor has it, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def no_autocast(x: Tensor) -> torch.autocast:
    """Inside, products keep the precision of their operands."""
    return torch.autocast(x.device.type, enabled=False)


def has_fp32_output(device: torch.device) -> bool:
    """Whether torch.mm takes `out_dtype` there."""
    return device.type == "cuda"


def chunks(n: int, size: int) -> Iterator[slice]:
    """The slices of 0..n of at most `size` rows."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def default_chunk(vocab: int, device: torch.device) -> int:
    """Rows per chunk, so that chunk × V stays at 2.5 M elements (10 MiB in fp32) on a CPU and 64 M (256 MiB) on a GPU.

    Fewer rows cost time: each chunk reads and writes the V×H weight gradient once, and a GPU starves on small products. More rows cost
    memory, and on a CPU beyond the caches time as well. That gives 80 rows at V = 32,768 on a CPU and 441 at V = 151,936 on a GPU.
    """
    if device.type == "cpu":
        return min(max(5 * 2**19 // vocab, 40), 1024)
    return min(max(2**26 // vocab, 256), 8192)


class Projection:
    """A head cut to `vocab` ids and cast once for chunked products; holds no graph."""

    def __init__(self, head: Head, vocab: int, hidden_NH: Tensor, dtype: torch.dtype) -> None:
        weight_VH = head.weight_VH.detach()[:vocab]
        both_bf16 = weight_VH.dtype == hidden_NH.dtype == torch.bfloat16 and dtype == torch.float32
        self.dtype = dtype
        self.operand = torch.bfloat16 if both_bf16 and has_fp32_output(weight_VH.device) else dtype
        self.weight_VH = weight_VH.to(self.operand)
        self.bias_V = None if head.bias_V is None else head.bias_V.detach()[:vocab].to(dtype)
        self.scale, self.softcap = head.scale, head.softcap

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b with `dtype` output."""
        a, b = a.to(self.operand), b.to(self.operand)
        return torch.mm(a, b, out=out) if self.operand == self.dtype else torch.mm(a, b, out_dtype=self.dtype, out=out)

    def logits(self, hidden_nH: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, V), in `out` or a fresh tensor; equals Head.logits."""
        z_nV = self.product(hidden_nH, self.weight_VH.T, out)
        if self.bias_V is not None:
            z_nV += self.bias_V
        if self.scale != 1.0:
            z_nV *= self.scale
        if self.softcap is not None:
            z_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_nV

    def slope(self, z_nV: Tensor) -> Tensor | None:
        """Derivative of the cap at capped logits, `1 - (z/softcap)²`; None without a cap."""
        return None if self.softcap is None else 1.0 - (z_nV / self.softcap).square_()


class HeadGradients:
    """Gradients with respect to hidden states, weight and bias, summed over chunks in fp32 (fp64 for fp64 operands)."""

    def __init__(self, projection: Projection, hidden_NH: Tensor, head: Head, needs: tuple[bool, bool, bool]) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        self.projection, self.vocab, dtype = projection, len(projection.weight_VH), projection.dtype
        self.hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        # Rows beyond the vocabulary stay at 0.
        self.weight_VH = torch.zeros_like(head.weight_VH, dtype=dtype) if needs_weight else None
        self.bias_V = torch.zeros_like(head.bias_V, dtype=dtype) if needs_bias and head.bias_V is not None else None
        self.dtypes = (head.weight_VH.dtype, None if head.bias_V is None else head.bias_V.dtype)

    def add(self, rows: slice, hidden_nH: Tensor, grad_nV: Tensor, slope_nV: Tensor | None, c_n: Tensor) -> None:
        """Adds a chunk: `grad_nV` (may be overwritten) is a row's derivative by its logits, which counts c_n times."""
        if slope_nV is not None:
            grad_nV *= slope_nV
        # The row factors go to the (n, H) side, which is narrower than (n, V).
        c_n1 = (c_n * self.projection.scale)[:, None]
        product = self.projection.product
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = (product(grad_nV, self.projection.weight_VH) * c_n1).to(self.hidden_NH.dtype)
        if self.weight_VH is not None:
            weighted_nH = hidden_nH.to(c_n1.dtype) * c_n1
            target_VH = self.weight_VH[: self.vocab]
            if self.projection.operand == self.projection.dtype:
                target_VH.addmm_(grad_nV.T, weighted_nH)
            else:
                target_VH += product(grad_nV.T, weighted_nH)
        if self.bias_V is not None:
            self.bias_V[: self.vocab] += c_n1[:, 0] @ grad_nV

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients in the dtypes of what they belong to; None for what was not asked for."""
        weight_dtype, bias_dtype = self.dtypes
        weight_VH = None if self.weight_VH is None else self.weight_VH.to(weight_dtype)
        bias_V = None if self.bias_V is None else self.bias_V.to(bias_dtype)
        return self.hidden_NH, weight_VH, bias_V
