"""The frozen records that the stages exchange, the shape legend, and the protocols between stages.

Shape letters, everywhere in the package (after the paper, arXiv 2605.21924):

    B  prompts (groups) of a step        K  sibling rollouts of one prompt      R  rollouts of a call
    P  tokens of a prompt, image tokens included                                T  tokens of one response
    N  response tokens of a call, flat and ragged: N = sum of all T, in sibling order, group after group
    V  vocabulary (the tokenizer's ids)  H, G  hidden size of student, of teacher

`hidden_N[i]` is always the post-final-norm state that *predicts* `ids_N[i]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vaopd.core import Head

ORIGINAL = "original"  # the image as the data has it
DEGRADED = "degraded"  # the same image after the configured view (vaopd.views), same size


@dataclass(frozen=True)
class Example:
    """One row of a data set. Images are undecoded: a file's path, or the bytes of an encoded image."""

    id: str
    images: tuple[Path | bytes, ...]
    problem: str  # `<image>` marks where each image goes
    answer: str | None = None  # only grading reads it
    solution: str | None = None  # only `sft` and `off_policy_kd` read it


@dataclass(frozen=True)
class Prompt:
    """A rendered example: what the model is given before it answers."""

    id: str
    ids_P: Tensor  # (P,) int64 on the CPU, image placeholders expanded
    # view -> keyword arguments of the model for all images of the prompt, on the CPU (Qwen-VL: `pixel_values`,
    # `image_grid_thw`); empty for a text-only prompt. Every view has the same shapes and grid, so the same ids.
    images: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A prompt with its sibling rollouts; the unit of scoring and weighting, never split over processes."""

    prompt: Prompt
    responses: tuple[Tensor, ...]  # K of (T_k,) int64; the first EOS included, nothing after it; may be empty
    ended_K: tuple[bool, ...]  # True: stopped at an EOS. False: cut at the length limit
    sampler_logp_N: Tensor | None = None  # (N,) fp32, log-probability under the sampling distribution; None: given, or not known
    # (N,) fp32 log p(y_t) at temperature 1 over the whole LM head, as the server that sampled computed it; None: no server did
    served_logp_N: Tensor | None = None

    @property
    def ids_N(self) -> Tensor:
        """(N,) the responses' tokens in sibling order."""
        return torch.cat(self.responses) if self.responses else torch.empty(0, dtype=torch.long)

    @property
    def lengths(self) -> list[int]:
        """K response lengths in tokens."""
        return [len(response) for response in self.responses]

    def take(self, siblings: Sequence[int]) -> Group:
        """The group with these siblings alone; log-probabilities of the sampler aren't carried over."""
        return Group(self.prompt, tuple(self.responses[k] for k in siblings), tuple(self.ended_K[k] for k in siblings))


@dataclass(frozen=True)
class Scores:
    """What the teacher says about one group's response tokens."""

    hidden_NG: Tensor  # (N, G) the teacher's states under the original view
    # view -> (N,) fp32 log p_T(y_t | view, question, y_<t) at temperature 1; empty where nothing reads them
    logp_N: Mapping[str, Tensor]


class ResponseForward(Protocol):
    """The operation at the centre: the hidden states that predict the responses."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], view: str) -> Tensor:
        """(N, H) over all groups, in order."""
        ...


class RolloutEngine(Protocol):
    """Where responses come from: sampled from the student, or given by the data."""

    def generate(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]: ...


class Teacher(Protocol):
    """A frozen model that scores responses."""

    @property
    def head(self) -> Head: ...

    def score(self, groups: Sequence[Group], views: Sequence[str]) -> list[Scores]:
        """States under the original view, and log-probabilities under `views`: none, or the original one and any others."""
        ...
