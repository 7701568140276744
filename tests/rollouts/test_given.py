"""Responses from the data."""

from __future__ import annotations

import pytest
import torch

from vaopd.rollouts.given import GivenEngine
from vaopd.types import Prompt

PROMPTS = [Prompt(name, torch.arange(3)) for name in ("a", "b", "c")]
RESPONSES = {"a": torch.tensor([5, 6, 2]), "b": torch.tensor([5, 6, 7, 2]), "c": torch.tensor([5, 6, 7, 8, 2])}


def test_one_group_of_the_datas_response_whatever_k() -> None:
    for k in (1, 4):
        groups = GivenEngine(RESPONSES, max_tokens=10).generate([PROMPTS[2], PROMPTS[0]], k, 7)
        assert [group.prompt.id for group in groups] == ["c", "a"]
        assert [[r.tolist() for r in group.responses] for group in groups] == [[[5, 6, 7, 8, 2]], [[5, 6, 2]]]
        assert [group.ended_K for group in groups] == [(True,), (True,)]
        assert all(group.sampler_logp_N is None for group in groups)


def test_longer_ones_are_cut_and_say_so() -> None:
    groups = GivenEngine(RESPONSES, max_tokens=4).generate(PROMPTS, 1, 1)
    assert [group.responses[0].tolist() for group in groups] == [[5, 6, 2], [5, 6, 7, 2], [5, 6, 7, 8]]
    assert [group.ended_K for group in groups] == [(True,), (True,), (False,)]


def test_a_prompt_without_a_response_is_an_error() -> None:
    with pytest.raises(KeyError):
        GivenEngine({}, max_tokens=4).generate(PROMPTS[:1], 1, 1)
