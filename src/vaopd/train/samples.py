"""Rollouts with every token's scores, for the report and for whoever reads `samples.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaopd.core import Weighting, advantage_for, fused_weighted_divergence, token_coefficients, token_log_probs
from vaopd.models.forward import counted_by, head_of, micro_batches
from vaopd.train.step import layout
from vaopd.types import DEGRADED, ORIGINAL, Group, ResponseForward, Teacher


@dataclass(frozen=True)
class Scored:
    """Per group, per rollout: column -> one number per token (docs/run_folder.md, samples.jsonl)."""

    groups: list[list[dict[str, list[float]]]]

    def mean(self, column: str) -> float | None:
        """The mean of a column over all tokens; None without any."""
        values = [value for group in self.groups for rollout in group for value in rollout[column]]
        return sum(values) / len(values) if values else None


@torch.no_grad()
def score_groups(
    student: Any,
    teacher: Teacher,
    groups: Sequence[Group],
    *,
    vocab_size: int,
    forward: ResponseForward,
    tokens_per_forward: int,
    weighting: Weighting,
    deadband: float,
    divergence: str,
) -> Scored:
    """Advantage, divergence, coefficient and log-probabilities of every token; groups may have lost all their rollouts."""
    whole = [group for group in groups if group.responses]
    if not whole:
        return Scored([[] for _ in groups])
    scores = teacher.score(whole, (ORIGINAL, DEGRADED))
    logp = {view: torch.cat([score.logp_N[view] for score in scores]) for view in (ORIGINAL, DEGRADED)}
    a_N = advantage_for(weighting, logp[ORIGINAL], logp[DEGRADED], deadband=deadband)
    c_N = token_coefficients(a_N, *layout(whole), weighting)
    batches = micro_batches(whole, tokens_per_forward, counted_by(forward, student))
    hidden_NH = torch.cat([forward(student, batch, ORIGINAL) for batch in batches])
    head = head_of(student, vocab_size)
    hidden_NG = torch.cat([score.hidden_NG for score in scores])
    _, kl_N = fused_weighted_divergence(hidden_NH, head, hidden_NG, teacher.head, c_N, divergence=divergence)
    ids_N = torch.cat([group.ids_N for group in whole]).to(hidden_NH.device)
    columns = {
        "va": a_N,
        "kl": kl_N,
        "coefficient": c_N,
        "logp_teacher": logp[ORIGINAL],
        "logp_degraded": logp[DEGRADED],
        "logp_student": token_log_probs(hidden_NH, head, ids_N),
    }
    lengths = [length for group in whole for length in group.lengths]
    rollouts = _by_rollout(columns, lengths)
    return Scored([[next(rollouts) for _ in group.responses] for group in groups])


def _by_rollout(columns: dict[str, Tensor], lengths: Sequence[int]) -> Iterator[dict[str, list[float]]]:
    parts = {name: column.float().cpu().split(list(lengths)) for name, column in columns.items()}
    for index in range(len(lengths)):
        yield {name: [round(value, 5) for value in part[index].tolist()] for name, part in parts.items()}


def token_pieces(tokenizer: Any) -> Callable[[Tensor], list[str]]:
    """Token ids -> their texts, which join to the response; a character that spans tokens shows at its last one."""

    def pieces(ids_T: Tensor) -> list[str]:
        found: list[str] = []
        waiting: list[int] = []
        for place, index in enumerate(ids_T.tolist(), 1):
            waiting.append(index)
            text = tokenizer.decode(waiting, skip_special_tokens=False)
            # UTF-8 has at most four bytes; a response cut inside a character shows what there is of it.
            unfinished = text.endswith("\ufffd") and len(waiting) < 4 and place < len(ids_T)
            found.append("" if unfinished else text)
            waiting = waiting if unfinished else []
        return found

    return pieces
