"""Responses from the data: the engine of `sft` and `off_policy_kd`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vaopd.types import Group, Prompt


class GivenEngine:
    """One response per prompt, the data's solution, whatever K is asked for.

    Args:
        responses: prompt id -> (T,) token ids with the EOS.
        max_tokens: longer solutions are cut there and count as truncated.
    """

    def __init__(self, responses: Mapping[str, Tensor], *, max_tokens: int) -> None:
        self.responses, self.max_tokens = responses, max_tokens

    def generate(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        """One group of one response for each prompt."""
        groups = []
        for prompt in prompts:
            response = self.responses[prompt.id]
            groups.append(Group(prompt, (response[: self.max_tokens],), (len(response) <= self.max_tokens,)))
        return groups
