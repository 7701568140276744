"""What visual_advantage accepts and refuses; its values are in test_laws.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vaopd.core import VAOPD, advantage_for, visual_advantage

from . import reference

scores = st.floats(-30, 0, width=32)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(scores, scores), max_size=20), st.sampled_from([0.0, 1e-4, 0.5]))
def test_equals_the_loop(pairs: list[tuple[float, float]], deadband: float) -> None:
    original, degraded = [x for x, _ in pairs], [y for _, y in pairs]
    a_N = visual_advantage(torch.tensor(original).double(), torch.tensor(degraded).double(), deadband=deadband)
    assert a_N.tolist() == reference.visual_advantage(original, degraded, deadband)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(scores, scores), max_size=20), st.sampled_from([0.0, 0.5]))
def test_the_absolute_difference_is_the_positive_part_of_one_sign_or_the_other(pairs: list[tuple[float, float]], deadband: float) -> None:
    original, degraded = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T
    both = visual_advantage(original, degraded, deadband=deadband) + visual_advantage(degraded, original, deadband=deadband)
    assert visual_advantage(original, degraded, deadband=deadband, absolute=True).tolist() == both.tolist()
    assert advantage_for(VAOPD(absolute=True), original, degraded, deadband=deadband).tolist() == both.tolist()
    assert (
        advantage_for(VAOPD(), original, degraded, deadband=deadband).tolist()
        == visual_advantage(original, degraded, deadband=deadband).tolist()
    )


def test_keeps_the_dtype_and_carries_no_gradient() -> None:
    a_N = visual_advantage(torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0, -1.0]))
    assert a_N.dtype == torch.float32
    assert not a_N.requires_grad


@pytest.mark.parametrize(
    ("original", "degraded", "deadband", "message"),
    [
        (torch.zeros(3), torch.zeros(2), 1e-4, "lengths must agree"),
        (torch.zeros(1, 3), torch.zeros(1, 3), 1e-4, "from_padded"),
        (torch.tensor([0.0, float("nan")]), torch.zeros(2), 1e-4, "logp_original_N must be finite.*nan at 1"),
        (torch.zeros(2), torch.tensor([-float("inf"), 0.0]), 1e-4, "logp_degraded_N must be finite"),
        (torch.zeros(2).bfloat16(), torch.zeros(2), 1e-4, "float32 or float64"),
        (torch.zeros(2), torch.zeros(2), -1.0, "deadband"),
    ],
)
def test_refuses(original: torch.Tensor, degraded: torch.Tensor, deadband: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visual_advantage(original, degraded, deadband=deadband)
