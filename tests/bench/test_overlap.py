"""What of the second view generation could hide, on timelines whose answer is known."""

from __future__ import annotations

import pytest
import torch

from vaopd.bench.overlap import Wave, exposed, ready_times, waves_of
from vaopd.types import Group, Prompt


def group(*lengths: int) -> Group:
    return Group(
        Prompt("p", torch.zeros(3, dtype=torch.long)), tuple(torch.zeros(n, dtype=torch.long) for n in lengths), (True,) * len(lengths)
    )


def test_what_is_left_after_the_generation() -> None:
    """Ready at 1, 5 and 8 of 10: the second ends at 8, the third begins at once and ends at 11."""
    waves = [Wave(8.0, 3.0), Wave(1.0, 2.0), Wave(5.0, 3.0)]
    assert exposed(waves, end=10.0) == pytest.approx(1.0)
    assert exposed(waves, end=20.0) == 0.0
    assert exposed([Wave(10.0, 4.0)], end=10.0) == 4.0  # all groups together: nothing is hidden


def test_waves_wait_for_one_another() -> None:
    """The device is busy with the first until 7, though the second is ready at 2."""
    assert exposed([Wave(1.0, 6.0), Wave(2.0, 6.0)], end=10.0) == pytest.approx(3.0)


def test_a_group_is_ready_with_its_longest_sibling() -> None:
    """Call 0 is the prompt's, call t feeds token t - 1; a sibling of two tokens has ended when call 2 begins without it."""
    calls = [0.0, 1.0, 2.0, 3.0]
    assert ready_times([group(1, 2), group(3, 1), group(4)], calls, end=3.5) == [2.0, 3.0, 3.5]


def test_waves_are_in_the_order_of_readiness() -> None:
    assert waves_of([group(1)] * 3, [0.3, 0.1, 0.2], size=2) == [[1, 2], [0]]
