"""The prompts of a run's steps: while a step computes, those of the next one are rendered."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager

from vaopd.train.schedule import example_indices
from vaopd.train.setup import Run
from vaopd.types import ORIGINAL, Prompt


class PromptsAhead:
    """Photographs are decoded, degraded and resized on the CPU, outside of Python's lock: beside a step that takes little time of its own
    (docs/performance.md). The prompts are the same.

    Args:
        thread: of one worker.
    """

    def __init__(self, run: Run, thread: Executor) -> None:
        self.run, self.thread = run, thread
        self._next: Future[list[Prompt]] | None = None

    @contextmanager
    def during(self, step: int) -> Iterator[list[Prompt]]:
        """The prompts of a step, to be taken in order; the thread works inside only. What is wrong with a prompt is raised at its step."""
        prompts = self._next.result() if self._next else step_prompts(self.run, step)
        self._next = self.thread.submit(step_prompts, self.run, step + 1) if step < self.run.steps else None
        try:
            yield prompts
        finally:
            if self._next:
                wait([self._next])  # what comes between two steps uses the tokenizer too, which serves one thread at a time


def step_prompts(run: Run, step: int) -> list[Prompt]:
    """This process' share of a step's prompts, in the views that are scored."""
    optim, accelerator = run.config.optim, run.tools.accelerator
    last = None if optim.steps else round(optim.epochs * len(run.train))
    indices = example_indices(run.config.seed, step, len(run.train), optim.prompts_per_step, last=last)
    share = indices[accelerator.process_index :: accelerator.num_processes]
    return [run.renderer(run.train[index], run.tools.views or (ORIGINAL,)) for index in share]
