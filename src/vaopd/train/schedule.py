"""What a step number alone decides: the learning rate, the prompts, the seeds. So a resumed run needs no state for them."""

from __future__ import annotations

import math
import random

from vaopd.config import OptimConfig


def total_steps(optim: OptimConfig, examples: int) -> int:
    """`optim.steps`, or the steps that `optim.epochs` passes over the data take."""
    return optim.steps or max(1, math.ceil(round(optim.epochs * examples) / optim.prompts_per_step))


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Of step 1..steps: linear warm-up over the first share, then cosine towards zero, or constant."""
    warmup = math.ceil(optim.warmup * steps)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, steps - warmup)))


def example_indices(seed: int, step: int, examples: int, per_step: int, *, last: int | None = None) -> list[int]:
    """Which examples step 1, 2, … trains on: passes over the data one after another, each in its own seeded order.

    Args:
        last: length of the whole stream, where it ends inside a step; None: endless.
    """
    start, stop = (step - 1) * per_step, step * per_step
    places = range(start, stop if last is None else min(stop, last))
    orders = {epoch: epoch_order(seed, epoch, examples) for epoch in {place // examples for place in places}}
    return [orders[place // examples][place % examples] for place in places]


def epoch_order(seed: int, epoch: int, examples: int) -> list[int]:
    """A permutation of the examples."""
    order = list(range(examples))
    random.Random(f"{seed}|{epoch}").shuffle(order)
    return order
