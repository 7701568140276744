"""What the core refuses. Every message states the rule, the value found, and the fix."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

EXACT = (torch.float32, torch.float64)


def require_finite(name: str, x: Tensor, fix: str) -> None:
    """Raises ValueError at the first NaN or infinity of `x`."""
    bad = ~torch.isfinite(x)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        where = index[0] if len(index) == 1 else index
        raise ValueError(
            f"{name} must be finite, but {int(bad.sum())} of {x.numel()} values are not (first: {x[index].item()} at {where}). {fix}"
        )


def require_flat(**tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is one-dimensional."""
    for name, x in tensors.items():
        if x.ndim != 1:
            raise ValueError(
                f"{name} must be flat, one entry per token or rollout, but has shape {tuple(x.shape)}. "
                "Use from_padded(x_RT, mask_RT) to drop the padding."
            )


def require_same_length(**tensors: Tensor) -> None:
    """Raises ValueError unless the leading dimensions agree."""
    lengths = {name: x.shape[0] for name, x in tensors.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise ValueError(
            f"These tensors have one entry each per response token, so their lengths must agree ({found}). Cut all of them by one mask."
        )


def require_exact(name: str, x: Tensor) -> None:
    """Raises ValueError for half precision: a bf16 log-probability near -5 is known to about 0.02 only."""
    if x.dtype not in EXACT:
        raise ValueError(
            f"{name} must be float32 or float64, but is {x.dtype}. "
            "Compute it with token_log_probs and keep it out of autocast and FSDP casts."
        )


def require_integers(**tensors: Tensor) -> None:
    """Raises ValueError unless every tensor holds indices."""
    for name, x in tensors.items():
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"{name} holds indices and must have an integer dtype, but is {x.dtype}. Use torch.long.")


def require_positive(**numbers: float) -> None:
    """Raises ValueError unless every number is above 0 and finite."""
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a finite number above 0, but is {value}.")


def require_share(name: str, value: float, *, zero: bool = False, one: bool = False) -> None:
    """Raises ValueError unless `value` is a share; `zero` and `one` say whether the ends are allowed."""
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name} is a share and must lie in {interval}, but is {value}.")


def refuse_create_graph(what: str) -> None:
    """Raises RuntimeError in a backward that is itself recorded: its result would count as a constant, silently."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} is differentiable once, but its backward was called with create_graph=True. Use token_divergence or Head.logits."
        )


def is_dtensor(x: Tensor | None) -> bool:
    """Whether `x` is sharded. No tensor can be a DTensor before its module was imported, so nothing is imported here."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
