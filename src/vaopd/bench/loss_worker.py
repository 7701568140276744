"""One loss in a process of its own, so that its peak memory is its own: `python -m vaopd.bench.loss_worker KERNEL N V H G [TILE]`.

Reads a command per line and answers each with a line of JSON: `run` -> {"seconds", "peak_mib"}, `check` -> {"error"}. Before the first
command it says {"ready": true}, or {"missing": NAME} when the kernel's package is not installed.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vaopd.core import Head, fused_weighted_divergence
from vaopd.train.health import process_status

CHECK_ROWS = 64  # of the reference that gradients are checked against


@dataclass(frozen=True)
class Operands:
    """Student and teacher states and heads, and a weight per row."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_NG: Tensor
    teacher_VG: Tensor
    c_N: Tensor


Loss = Callable[[Operands], Tensor]


def make_operands(N: int, V: int, H: int, G: int) -> Operands:
    """Random ones; logits with a spread of about 1.3 and 1."""
    torch.manual_seed(0)
    hidden_NH, weight_VH = 0.5 * torch.randn(N, H), 0.08 * torch.randn(V, H)
    teacher_NG, teacher_VG = 0.5 * torch.randn(N, G), 0.08 * torch.randn(V, G)
    return Operands(hidden_NH.requires_grad_(), weight_VH.requires_grad_(), teacher_NG, teacher_VG, torch.rand(N))


def fused(x: Operands) -> Tensor:
    """The package's."""
    return fused_weighted_divergence(x.hidden_NH, Head(x.weight_VH), x.teacher_NG, Head(x.teacher_VG), x.c_N)[0]


def materialised(x: Operands) -> Tensor:
    """Whole logits and autograd, as the formula is written."""
    logq_NV = torch.log_softmax(x.hidden_NH @ x.weight_VH.T, -1)
    with torch.no_grad():
        logp_NV = torch.log_softmax(x.teacher_NG @ x.teacher_VG.T, -1)
    return (x.c_N * (logq_NV.exp() * (logq_NV - logp_NV)).sum(-1)).sum()


def trl(tile: int | None) -> Loss:
    """TRL's kernel, the divergence of its DistillationTrainer; `tile` tokens at a time, None: as TRL has it."""
    from trl.kernels import chunked_divergence

    if tile is not None:
        chunked_divergence.TOKEN_CHUNK_SIZE = tile

    def loss(x: Operands) -> Tensor:
        heads = (x.weight_VH, None), (x.teacher_VG, None)
        kl_N, _ = chunked_divergence.ChunkedDivergenceFunction.apply(x.hidden_NH, *heads[0], x.teacher_NG, *heads[1], 1.0)
        return (x.c_N * kl_N).sum()

    return loss


def liger(tile: int | None) -> Loss:
    """Liger's, uncompiled as a CPU has it; it knows no weights, so it takes the mean."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    numbers = {} if tile is None else {"chunk_size": tile}
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False, **numbers)

    def loss(x: Operands) -> Tensor:
        return module(x.hidden_NH, x.weight_VH, x.teacher_NG, x.teacher_VG, torch.zeros(len(x.c_N), dtype=torch.long))

    return loss


def kernel(name: str, tile: int | None) -> Loss:
    """By name. Raises ImportError when its package is missing."""
    return {"fused": lambda: fused, "materialised": lambda: materialised, "trl": lambda: trl(tile), "liger": lambda: liger(tile)}[name]()


def run(loss: Loss, x: Operands) -> dict[str, float | None]:
    """Forward and backward: CPU seconds, and the memory above that of the operands at its peak (MiB; Linux alone tells)."""
    x.hidden_NH.grad = x.weight_VH.grad = None
    gc.collect()
    before = _reset_peak()
    start = time.process_time()
    loss(x).backward()
    seconds = time.process_time() - start
    peak = process_status("VmHWM")
    return {"seconds": seconds, "peak_mib": None if before is None or peak is None else peak - before}


def check(x: Operands, weighted: bool) -> dict[str, float]:
    """Largest error of the gradients of the last run, relative to their largest entry, against autograd in blocks of rows."""
    found = x.hidden_NH.grad, x.weight_VH.grad
    x.hidden_NH.grad = x.weight_VH.grad = None
    c_N = x.c_N if weighted else torch.full_like(x.c_N, 1 / len(x.c_N))
    for rows in range(0, len(c_N), CHECK_ROWS):
        part = slice(rows, rows + CHECK_ROWS)
        materialised(Operands(x.hidden_NH[part], x.weight_VH, x.teacher_NG[part], x.teacher_VG, c_N[part])).backward()
    pairs = list(zip(found, (x.hidden_NH.grad, x.weight_VH.grad), strict=True))
    return {"error": max(_relative(ours, theirs) for ours, theirs in pairs)}


def _relative(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None, "check comes after run"
    assert theirs is not None
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _reset_peak() -> float | None:
    """Starts VmHWM anew; the memory now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return process_status("VmRSS")


def main(arguments: list[str]) -> None:
    """Answer commands until the input ends."""
    torch.set_num_threads(1)
    name, sizes = arguments[0], [int(x) for x in arguments[1:]]
    try:
        loss = kernel(name, sizes[4] if len(sizes) > 4 else None)
    except ImportError as error:
        _say({"missing": error.name or name})
        return
    x = make_operands(*sizes[:4])
    _say({"ready": True})
    for line in sys.stdin:
        _say(run(loss, x) if line.strip() == "run" else check(x, weighted=name != "liger"))


def _say(answer: dict[str, float | None] | dict[str, float] | dict[str, bool] | dict[str, str]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
