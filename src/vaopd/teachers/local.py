"""A teacher in the trainer's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vaopd.core import Head, token_log_probs
from vaopd.models.forward import counted_by, head_of, micro_batches
from vaopd.types import ORIGINAL, Group, ResponseForward, Scores


class LocalTeacher:
    """Scores responses with a frozen model: states of the original view, log-probabilities of the sampled tokens where they are read.

    Args:
        model: the teacher; its parameters are frozen here, unless they are the student's.
        vocab_size: the tokenizer's size.
        forward: how the hidden states are computed.
        tokens_per_forward: prompt and response tokens of one forward pass, as `forward` counts them.
        within: the model is the teacher inside `within(model)` only: one that is the student too (vaopd.models.lora.adapters_off), or
            whose weights are elsewhere between scorings (vaopd.teachers.offload.Visits).
        device: where the loss needs the head; None: where the model is.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        forward: ResponseForward,
        tokens_per_forward: int,
        within: Callable[[Any], AbstractContextManager[None]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.vocab_size, self.within, self.device = model, vocab_size, within, device
        if within is None:
            model.eval().requires_grad_(False)
        self.forward, self.tokens_per_forward = forward, tokens_per_forward

    @property
    def head(self) -> Head:
        """The LM head over the tokenizer's ids. Where the model is elsewhere, a copy on the device for as long as it is held."""
        head = head_of(self.model, self.vocab_size)
        if self.device is None:
            return head
        return replace(head, weight_VH=head.weight_VH.to(self.device), bias_V=None if head.bias_V is None else head.bias_V.to(self.device))

    def present(self) -> AbstractContextManager[None]:
        """Inside, the model is the teacher and can be called."""
        return self.within(self.model) if self.within else nullcontext()

    @torch.no_grad()
    def score(self, groups: Sequence[Group], views: Sequence[str] = ()) -> list[Scores]:
        """Scores of every group, in order, with log-probabilities under `views`: none, or the original one and any others.

        Without them the head is not multiplied: the divergence needs the states alone. A text-only prompt looks the same under every view,
        so it gets the same numbers, not a second rounding of them.
        """
        with self.present():
            return self._score(groups, views)

    def _score(self, groups: Sequence[Group], views: Sequence[str]) -> list[Scores]:
        hidden = self._hidden(groups, ORIGINAL)
        logp = {ORIGINAL: self._logp(groups, hidden)} if views else {}
        for view in set(views) - {ORIGINAL}:
            pictured = [group for group in groups if group.prompt.images]
            scored = iter(self._logp(pictured, self._hidden(pictured, view)) if pictured else ())
            logp[view] = [next(scored) if g.prompt.images else same for g, same in zip(groups, logp[ORIGINAL], strict=True)]
        return [Scores(hidden_NG, {view: logp[view][index] for view in logp}) for index, hidden_NG in enumerate(hidden)]

    def _hidden(self, groups: Sequence[Group], view: str) -> list[Tensor]:
        """Per group (N, G)."""
        batches = micro_batches(groups, self.tokens_per_forward, counted_by(self.forward, self.model))
        hidden_NG = torch.cat([self.forward(self.model, batch, view) for batch in batches])
        return list(hidden_NG.split([sum(group.lengths) for group in groups]))

    def _logp(self, groups: Sequence[Group], hidden: Sequence[Tensor]) -> list[Tensor]:
        """Per group (N,) fp32."""
        ids_N = torch.cat([group.ids_N for group in groups]).to(hidden[0].device)
        logp_N = token_log_probs(torch.cat(list(hidden)), self.head, ids_N)
        return list(logp_N.split([sum(group.lengths) for group in groups]))
