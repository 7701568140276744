"""The next step's prompts: rendered beside a step and only then, the same as without."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from vaopd.errors import DataError
from vaopd.train.prompts import PromptsAhead, step_prompts

ROWS = 10


@dataclass
class Rendered:
    """A renderer that notes who asked it for what."""

    calls: list[tuple[int, bool]] = field(default_factory=list)  # row, by the main thread
    bad: int | None = None
    gate: threading.Event = field(default_factory=threading.Event)

    def __call__(self, row: int, views: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
        by_main = threading.current_thread() is threading.main_thread()
        if not by_main:
            self.gate.wait(10)
        self.calls.append((row, by_main))
        if row == self.bad:
            raise DataError(f"row {row}")
        return row, views


def run_of(renderer: Rendered, *, steps: int = 3, processes: int = 1, index: int = 0) -> SimpleNamespace:
    tools = SimpleNamespace(views=(), accelerator=SimpleNamespace(process_index=index, num_processes=processes))
    config = SimpleNamespace(seed=5, optim=SimpleNamespace(steps=steps, prompts_per_step=4))
    return SimpleNamespace(config=config, tools=tools, train=list(range(ROWS)), renderer=renderer, steps=steps)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_a_thread_renders_the_next_step_while_this_one_computes_and_at_no_other_time(thread):
    renderer = Rendered()
    run = run_of(renderer)
    expected = {step: step_prompts(run_of(Rendered()), step) for step in (1, 2, 3)}
    ahead = PromptsAhead(run, thread)
    for step in (1, 2, 3):
        before = len(renderer.calls)
        renderer.gate.clear()
        with ahead.during(step) as prompts:
            assert prompts == expected[step]
            assert len(renderer.calls) == before + 4 * (step == 1)  # the thread waits for the step
            renderer.gate.set()
        assert len(renderer.calls) == min(4 * (step + 1), 12)  # and has ended when the step is left, after the last one too
    assert [by_main for _, by_main in renderer.calls] == [True] * 4 + [False] * 8


def test_a_bad_row_ends_the_run_at_its_own_step(thread):
    (bad, _), *_ = step_prompts(run_of(Rendered()), 2)  # of the same epoch as step 1, which has other rows
    renderer = Rendered(bad=bad)
    renderer.gate.set()
    ahead = PromptsAhead(run_of(renderer), thread)
    with ahead.during(1):
        pass
    with pytest.raises(DataError, match=f"row {bad}"), ahead.during(2):
        pytest.fail("a step without prompts")


def test_a_step_that_fails_leaves_nothing_running(thread):
    renderer = Rendered()
    ahead = PromptsAhead(run_of(renderer), thread)

    def step() -> None:
        with ahead.during(1):
            renderer.gate.set()
            raise RuntimeError("the step")

    with pytest.raises(RuntimeError, match="the step"):
        step()
    assert len(renderer.calls) == 8


def test_each_process_renders_its_share():
    whole = step_prompts(run_of(Rendered()), 1)
    shares = [step_prompts(run_of(Rendered(), processes=2, index=index), 1) for index in (0, 1)]
    assert shares == [whole[0::2], whole[1::2]]
