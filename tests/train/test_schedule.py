"""What a step number alone decides."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaopd.config import OptimConfig
from vaopd.train.schedule import example_indices, learning_rate, total_steps


def optim(**values: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 8.0, **values})


def test_cosine_with_warm_up_by_hand() -> None:
    """20 steps, 20 % warm-up: 2, 4, 6, 8 over four steps, then half a cosine from 8 over the other sixteen."""
    rates = [learning_rate(optim(warmup=0.2), step, 20) for step in range(1, 21)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[12] == pytest.approx(4.0)  # step 13: 8 of 16 behind, cos(π/2) = 0
    assert rates[8] == pytest.approx(8.0 * (1 + math.sqrt(0.5)) / 2)  # step 9: 4 of 16, cos(π/4)
    assert rates[16] == pytest.approx(8.0 * (1 - math.sqrt(0.5)) / 2)  # step 17: 12 of 16
    assert rates[19] == pytest.approx(8.0 * 0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[19] > 0, "no step is wasted on a rate of 0"


def test_constant_after_warm_up() -> None:
    assert [learning_rate(optim(warmup=0.5, schedule="constant"), step, 4) for step in range(1, 5)] == [4.0, 8.0, 8.0, 8.0]


def test_the_papers_share_is_rounded_up() -> None:
    """5 % of 30 steps is one and a half: two steps of warm-up."""
    assert [learning_rate(optim(warmup=0.05), step, 30) for step in (1, 2, 3)] == [4.0, 8.0, 8.0]


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_the_ends_of_the_warm_up(warmup: float) -> None:
    rates = [learning_rate(optim(warmup=warmup), step, 4) for step in range(1, 5)]
    assert rates == ([2.0, 4.0, 6.0, 8.0] if warmup else [8.0, *(4 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))])


@given(st.floats(0, 1), st.integers(1, 200), st.sampled_from(["cosine", "constant"]))
def test_a_rate_is_never_0_nor_above_the_top(warmup: float, steps: int, schedule: str) -> None:
    rates = [learning_rate(optim(warmup=warmup, schedule=schedule), step, steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 8.0 for rate in rates)
    assert max(rates) == 8.0


def test_how_many_steps() -> None:
    assert total_steps(optim(prompts_per_step=16, epochs=5), 2101) == 657  # 10,505 prompts
    assert total_steps(optim(prompts_per_step=4, epochs=1), 8) == 2
    assert total_steps(optim(prompts_per_step=4, epochs=0.5), 6) == 1
    assert total_steps(optim(prompts_per_step=4, epochs=0.01), 6) == 1
    assert total_steps(optim(prompts_per_step=4, epochs=3, steps=11), 6) == 11


@given(st.integers(1, 25), st.integers(1, 12), st.integers(1, 4), st.integers(0, 5))
def test_every_epoch_is_a_permutation(examples: int, per_step: int, epochs: int, seed: int) -> None:
    """Nothing skipped, nothing repeated, whatever the sizes; the last step is the rest."""
    last = epochs * examples
    steps = math.ceil(last / per_step)
    assert steps == total_steps(optim(prompts_per_step=per_step, epochs=epochs), examples)
    taken = [example_indices(seed, step, examples, per_step, last=last) for step in range(1, steps + 1)]
    assert [len(step) for step in taken[:-1]] == [per_step] * (steps - 1)
    assert len(taken[-1]) == last - per_step * (steps - 1)
    ledger = [index for step in taken for index in step]
    for epoch in range(epochs):
        assert sorted(ledger[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_epochs_and_seeds_are_ordered_differently() -> None:
    epochs = [[i for step in range(1, 6) for i in example_indices(seed, step + 5 * epoch, 20, 4)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(20)) not in epochs


def test_an_endless_stream_goes_on_after_the_epoch() -> None:
    assert [len(example_indices(0, step, 5, 4)) for step in range(1, 50)] == [4] * 49


def test_a_step_may_take_more_than_all_examples() -> None:
    indices = example_indices(0, 1, 3, 8)
    assert len(indices) == 8
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]
