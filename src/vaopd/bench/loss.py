"""Time and memory of the fused loss against whole logits, TRL's kernel and Liger's, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from vaopd.bench.shapes import Plan
from vaopd.bench.timing import Ratio, Times, over

# Each kernel with its own block of tokens (None), and with those that were fastest in a search over 32 … 1024.
VARIANTS: tuple[tuple[str, int | None], ...] = (
    ("fused", None),
    ("materialised", None),
    ("trl", None),
    ("trl", 64),
    ("trl", 128),
    ("liger", None),
    ("liger", 64),
    ("liger", 128),
)


@dataclass(frozen=True)
class KernelResult:
    """One kernel at one block of tokens."""

    kernel: str
    tile: int | None
    times: Times
    peak_mib: float | None
    error: float  # of its gradients


@dataclass(frozen=True)
class LossResult:
    """All kernels at one size."""

    N: int
    V: int
    kernels: tuple[KernelResult, ...]  # those that are installed

    def best(self, kernel: str) -> KernelResult | None:
        """The fastest block of a kernel; None: not installed."""
        return min((k for k in self.kernels if k.kernel == kernel), key=lambda k: k.times.least, default=None)

    def time_over(self, kernel: str) -> Ratio | None:
        """The fused loss over the kernel at its fastest block."""
        other, ours = self.best(kernel), self.best("fused")
        return None if other is None or ours is None else over(ours.times, other.times)

    def memory_over(self, kernel: str) -> float | None:
        other, ours = self.best(kernel), self.best("fused")
        if other is None or ours is None or other.peak_mib is None or ours.peak_mib is None:
            return None
        return ours.peak_mib / other.peak_mib


@dataclass(frozen=True)
class MemoryResult:
    """Peak memory of the loss above that of its operands, in MiB; None where the system does not tell."""

    N: int
    V: int
    fused: float | None
    materialised: float | None
    gradient: float  # of the student's head alone: V·H in fp32, which no kernel can do without


class Worker:
    """A process of `vaopd.bench.loss_worker`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.installed = "ready" in self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line of JSON; other packages may print lines of their own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a process of the loss benchmark ended without an answer (exit code {self.process.wait()})")


@contextmanager
def worker(kernel: str, sizes: tuple[int, ...], tile: int | None) -> Iterator[Worker]:
    """Ends with the block."""
    arguments = [str(x) for x in (*sizes, *(() if tile is None else (tile,)))]
    command = [sys.executable, "-m", "vaopd.bench.loss_worker", kernel, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.communicate()


def measure_losses(plan: Plan, on_part: Callable[[str], None] = lambda _: None) -> list[LossResult]:
    """Every size of the plan."""
    results = []
    for N, V in plan.losses:
        on_part(f"loss N={N} V={V}")
        results.append(measure_loss(N, V, plan.loss_hidden, plan.rounds))
    return results


def measure_memory(plan: Plan) -> list[MemoryResult]:
    """The fused loss and whole logits at one N and growing V, each in a fresh process, which runs once."""
    N, vocabularies = plan.memory
    results = []
    for V in vocabularies:
        fused, materialised = (_peak(kernel, (N, V, *plan.loss_hidden)) for kernel in ("fused", "materialised"))
        results.append(MemoryResult(N, V, fused, materialised, gradient=V * plan.loss_hidden[0] / 2**18))
    return results


def _peak(kernel: str, sizes: tuple[int, ...]) -> float | None:
    with worker(kernel, sizes, None) as process:
        return process.ask("run")["peak_mib"]


def measure_loss(N: int, V: int, hidden: tuple[int, int], rounds: int) -> LossResult:
    """The kernels take turns; the first run of each shows its peak memory and is not timed."""
    with ExitStack() as stack:
        started = [(kernel, tile, stack.enter_context(worker(kernel, (N, V, *hidden), tile))) for kernel, tile in VARIANTS]
        workers = [(kernel, tile, process) for kernel, tile, process in started if process.installed]
        peaks = [process.ask("run")["peak_mib"] for _, _, process in workers]
        seconds = [[process.ask("run")["seconds"] for _, _, process in workers] for _ in range(rounds)]
        errors = [process.ask("check")["error"] for _, _, process in workers]
    return LossResult(
        N,
        V,
        tuple(
            KernelResult(kernel, tile, Times(tuple(turn[index] for turn in seconds)), peaks[index], errors[index])
            for index, (kernel, tile, _) in enumerate(workers)
        ),
    )
