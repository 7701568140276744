"""Could the second view be hidden behind generation? `python -m vaopd.bench.overlap` measures it with the built-in models.

A group can be scored as soon as its last sibling has ended, while others still generate. On a device of its own the scoring then takes
time that nobody waits for; on the same device it takes the same arithmetic, in smaller forwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vaopd.bench.timing import take_turns
from vaopd.config import WorldConfig
from vaopd.core import token_log_probs
from vaopd.data.render import Renderer
from vaopd.data.sources import read_examples
from vaopd.evaluate.held_out import sampler
from vaopd.models.forward import head_of
from vaopd.models.load import Source, load_model, open_source
from vaopd.models.shared_prompt import shared
from vaopd.rollouts.hf import Sampling
from vaopd.types import DEGRADED, Group, Prompt
from vaopd.views import view
from vaopd.world.data import write_world

PROMPTS, K, MOST_TOKENS, ROUNDS = 24, 4, 64, 7  # the demo's step
WAVES = (1, 4, 12, PROMPTS)  # groups of one scoring forward


@dataclass(frozen=True)
class Wave:
    """Groups that are scored in one forward."""

    ready: float  # seconds from the beginning of the generation until the last sibling of all of them has ended
    cost: float  # seconds of its forward


def exposed(waves: Sequence[Wave], end: float) -> float:
    """Seconds of scoring that are left when the generation ends, on a device of its own that takes the waves as they become ready."""
    free = 0.0
    for wave in sorted(waves, key=lambda wave: wave.ready):
        free = max(free, wave.ready) + wave.cost
    return max(free - end, 0.0)


def waves_of(groups: Sequence[Group], ready: Sequence[float], size: int) -> list[list[int]]:
    """Indices of groups, in the order in which they become ready."""
    order = sorted(range(len(groups)), key=lambda index: ready[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def ready_times(groups: Sequence[Group], calls: Sequence[float], end: float) -> list[float]:
    """When each group was ready, from the times at which each call of the model began: call t + 1 follows the draw of token t."""
    longest = [max(group.lengths) for group in groups]
    return [calls[length] if length < len(calls) else end for length in longest]


@contextmanager
def call_times(model: Any) -> Iterator[list[float]]:
    """CPU seconds at the beginning of every call of the model's body."""
    times: list[float] = []
    hook = model.model.register_forward_pre_hook(lambda *_: times.append(time.process_time()))
    try:
        yield times
    finally:
        hook.remove()


def degraded_scores(teacher: Any, groups: Sequence[Group], vocab: int) -> None:
    """What the second view costs: states and log-probabilities under the degraded image."""
    with torch.no_grad():
        states_NG = shared(teacher, groups, DEGRADED)
        token_log_probs(states_NG, head_of(teacher, vocab), torch.cat([group.ids_N for group in groups]))


def prompts_of(source: Source) -> list[Prompt]:
    """The demo's first questions, both views."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_world(WorldConfig(train=PROMPTS, eval=1, test=2), Path(folder))
        render = Renderer(source.processor, view("pixelate"))
        return [render(example) for example in read_examples(data.train)]


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    sources = [open_source(f"builtin:{name}") for name in ("student", "teacher")]
    student, teacher = (load_model(source, dtype=torch.float32) for source in sources)
    source, prompts = sources[0], prompts_of(sources[0])
    engine = sampler(student, source, Sampling(MOST_TOKENS), rows=PROMPTS * K)
    engine.generate(prompts, K, 0)
    with call_times(student) as calls:
        began = time.process_time()
        groups = engine.generate(prompts, K, 0)
        end = time.process_time() - began
    ready = ready_times(groups, [at - began for at in calls], end)
    parts = {size: [[groups[index] for index in wave] for wave in waves_of(groups, ready, size)] for size in WAVES}

    def scoring(size: int) -> Callable[[], None]:
        def run() -> None:
            for batch in parts[size]:
                degraded_scores(teacher, batch, source.vocab_size)

        return run

    times = take_turns({str(size): scoring(size) for size in WAVES}, ROUNDS)
    costs = {size: times[str(size)].least for size in WAVES}
    print(
        f"{PROMPTS} prompts x {K}, {sum(sum(g.lengths) for g in groups) / (PROMPTS * K):.0f} tokens a response: generation {end:.3f} CPU s"
    )
    print(f"half of the groups are whole after {100 * sorted(ready)[len(ready) // 2] / end:.0f} % of it")
    print("groups a forward   CPU s   over one forward   left after generation, on a device of its own as fast as this one")
    for size, cost in costs.items():
        # A forward's cost by its share of the groups.
        waves = [Wave(max(ready[index] for index in wave), cost * len(wave) / PROMPTS) for wave in waves_of(groups, ready, size)]
        left = exposed(waves, end)
        print(f"{size:>16}   {cost:.3f}   {cost / costs[PROMPTS]:>16.2f}   {left:.3f} s ({100 * left / costs[PROMPTS]:.0f} %)")


if __name__ == "__main__":
    main()
