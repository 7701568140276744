"""CPU time of variants that take turns, so that whatever else the machine does falls on all of them alike.

CPU time, not time on the clock: on a shared machine the latter gave 0.84 and 3.42 for one and the same ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """CPU seconds of one variant, one per round."""

    seconds: tuple[float, ...]

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """One variant's time over another's."""

    least: float  # of the fastest rounds: the work itself
    median: float  # of the middle rounds

    def inverse(self) -> Ratio:
        return Ratio(1 / self.least, 1 / self.median)


def over(ours: Times, theirs: Times) -> Ratio:
    """Below 1: ours is faster."""
    return Ratio(ours.least / theirs.least, ours.median / theirs.median)


def measure(run: Callable[[], object]) -> float:
    """CPU seconds of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def take_turns(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Every variant once to warm up, then `rounds` rounds of all variants in order."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(measure(run))
    return {name: Times(tuple(values)) for name, values in seconds.items()}
