"""READ THIS FIRST. One training step of visual-advantage on-policy distillation (arXiv 2605.21924), top to bottom.

Engine, teacher, weighting and loss are arguments, so the same lines train `va_opd`, `opd`, every ablation, `off_policy_kd` (the engine
gives the data's solutions) and `sft` (the loss is their negative log-likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vaopd.core import Head, Weighting, advantage_for, fused_weighted_divergence, token_coefficients, token_log_probs
from vaopd.models.forward import counted_by, head_of, micro_batches
from vaopd.train.metrics import Metrics, gap_metrics, rollout_metrics, score_metrics, weight_metrics
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt, ResponseForward, RolloutEngine, Scores, Teacher


@dataclass(frozen=True)
class Tools:
    """What a step works with; nothing here changes from step to step but the student's weights and the optimiser's state."""

    engine: RolloutEngine
    teacher: Teacher | None  # None: sft
    student_loss: nn.Module  # a prepared StudentLoss
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    views: tuple[str, ...]  # whose log-probabilities the weighting reads: both of eq. 2, or none
    k: int
    deadband: float
    clip: float
    tokens_per_forward: int


def train_step(prompts: Sequence[Prompt], step: int, weighting: Weighting, tools: Tools) -> Metrics:
    """Train on these prompts (this process' share of the step's) and return the metrics of docs/run_folder.md.

    A step with a non-finite score, loss or gradient on any process leaves weights and optimiser untouched on all of them.
    """
    # 1. The student answers each prompt K times; a rollout without a token is dropped, a prompt without rollouts too.
    rollouts = tools.engine.generate(prompts, tools.k, step)
    groups = drop_empty(rollouts)
    scored_prompts = total(tools.accelerator, len(groups))
    if scored_prompts == 0:
        return rollout_metrics(rollouts, groups)

    # 2. The teacher reads every response, looking at the image. Where eq. 2 is read, it scores each token with and without that sight.
    scores = tools.teacher.score(groups, tools.views) if tools.teacher and groups else []
    if anywhere(tools.accelerator, not finite(scores)):
        return rollout_metrics(rollouts, groups) | {"nonfinite": 1}

    # 3. Which tokens, and which rollouts, depend on the image (eq. 2), and so what each token's divergence weighs (eq. 3-5).
    a_N = advantages(groups, scores, weighting, tools.deadband)
    c_N = token_coefficients(a_N, *layout(groups), weighting)

    # 4. The weighted divergence of student and teacher (eq. 1 and 6): a mean over the prompts of all processes, in any micro-batches.
    # Data-parallel training averages gradients over processes, so each divides by its share of the prompts.
    normalizer = scored_prompts / tools.accelerator.num_processes
    share, kl_N, logp_N = backward(groups, scores, c_N, normalizer, tools)
    loss = mean_over_processes(tools.accelerator, share)

    # 5. The update, unless something was not finite.
    grad_norm = float(tools.accelerator.clip_grad_norm_(tools.student_loss.parameters(), tools.clip))
    applied = not anywhere(tools.accelerator, not (math.isfinite(grad_norm) and math.isfinite(loss)))
    if applied:
        tools.optimizer.step()
    tools.optimizer.zero_grad(set_to_none=True)

    measured = {"loss": loss, "grad_norm": grad_norm, "nonfinite": int(not applied)}
    compared = score_metrics(kl_N if tools.teacher else None, a_N if DEGRADED in tools.views else None)
    return rollout_metrics(rollouts, groups) | weight_metrics(groups, c_N) | compared | gap_metrics(groups, logp_N) | measured


class StudentLoss(nn.Module):
    """The student's whole forward and its loss in one module: the one that is prepared for data-parallel training.

    Args:
        model: the student.
        vocab_size: the tokenizer's size.
        forward: how the hidden states that predict the responses are computed.
        loss: a divergence (see vaopd.core.as_divergence), or "nll".
        with_logp: also compute log p_S(y_t) as a rollout server states it, to be compared with what it stated.
    """

    def __init__(self, model: nn.Module, *, vocab_size: int, forward: ResponseForward, loss: str, with_logp: bool = False) -> None:
        super().__init__()
        self.model, self.vocab_size, self.response_forward, self.loss = model, vocab_size, forward, loss
        self.with_logp = with_logp

    def forward(
        self, groups: Sequence[Group], teacher_hidden_NG: Tensor | None, teacher_head: Head | None, c_N: Tensor, normalizer: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(Σ c_t · KL_t / normalizer, detached KL_t of every token, `served_log_probs` or None); with "nll", -log p_S(y_t) for KL_t."""
        if not groups:  # a process without rollouts still takes part in the others' backward
            return sum((p.sum() * 0 for p in self.parameters() if p.requires_grad), torch.zeros(())), torch.empty(0), None
        hidden_NH = self.response_forward(self.model, groups, ORIGINAL)
        logp_N = served_log_probs(self.model, groups, hidden_NH.detach()) if self.with_logp else None
        c_N = c_N.to(hidden_NH.device)
        head = head_of(self.model, self.vocab_size)
        if self.loss == "nll":
            nll_N = -token_log_probs(hidden_NH, head, torch.cat([g.ids_N for g in groups]).to(hidden_NH.device))
            return (c_N * nll_N).sum() / normalizer, nll_N.detach(), logp_N
        if teacher_hidden_NG is None or teacher_head is None:
            raise ValueError(f"loss '{self.loss}' compares with a teacher's states, but none were given. Use loss 'nll' without a teacher.")
        compared = fused_weighted_divergence(
            hidden_NH, head, teacher_hidden_NG, teacher_head, c_N, normalizer=normalizer, divergence=self.loss
        )
        return *compared, logp_N


@torch.no_grad()
def served_log_probs(model: Any, groups: Sequence[Group], hidden_NH: Tensor) -> Tensor:
    """(N,) log p_S(y_t) at temperature 1 over every row of the LM head, padded ones too: what `Group.served_logp_N` is held to."""
    rows = model.get_output_embeddings().weight.shape[0]
    return token_log_probs(hidden_NH, head_of(model, rows), torch.cat([group.ids_N for group in groups]).to(hidden_NH.device))


def drop_empty(groups: Sequence[Group]) -> list[Group]:
    """Without the rollouts that have no token, and without the groups that have no rollout left."""
    kept = []
    for group in groups:
        whole = [index for index, response in enumerate(group.responses) if len(response)]
        if whole and len(whole) == len(group.responses):
            kept.append(group)
        elif whole:
            kept.append(group.take(whole))
    return kept


def layout(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """(rollout_N, group_R): the rollout of each token and the group of each rollout."""
    lengths_R = torch.tensor([length for group in groups for length in group.lengths], dtype=torch.long)
    group_R = torch.tensor([index for index, group in enumerate(groups) for _ in group.responses], dtype=torch.long)
    return torch.arange(len(lengths_R)).repeat_interleave(lengths_R), group_R


def advantages(groups: Sequence[Group], scores: Sequence[Scores], weighting: Weighting, deadband: float) -> Tensor:
    """(N,) eq. 2, or what else the weighting ranks by; zero where the degraded view was not scored, as for OPD and sft."""
    if not scores or DEGRADED not in scores[0].logp_N:
        return torch.zeros(sum(sum(group.lengths) for group in groups))
    original_N, degraded_N = (torch.cat([score.logp_N[view] for score in scores]) for view in (ORIGINAL, DEGRADED))
    return advantage_for(weighting, original_N, degraded_N, deadband=deadband)


def backward(
    groups: Sequence[Group], scores: Sequence[Scores], c_N: Tensor, normalizer: float, tools: Tools
) -> tuple[float, Tensor, Tensor | None]:
    """Accumulate the gradient of eq. 6 over micro-batches; returns this process' share of the loss, the tokens' divergence and, where
    the loss computes it, their log-probability."""
    hidden_NG = torch.cat([score.hidden_NG for score in scores]) if scores else None
    head = tools.teacher.head if tools.teacher else None
    student: StudentLoss = tools.accelerator.unwrap_model(tools.student_loss)
    batches = list(micro_batches(groups, tools.tokens_per_forward, counted_by(student.response_forward, student.model))) or [[]]
    loss, start, kl, logp = 0.0, 0, [], []
    for index, batch in enumerate(batches):
        tokens = slice(start, start := start + sum(sum(group.lengths) for group in batch))
        last = index == len(batches) - 1
        with nullcontext() if last else tools.accelerator.no_sync(tools.student_loss):
            part, kl_n, logp_n = tools.student_loss(batch, None if hidden_NG is None else hidden_NG[tokens], head, c_N[tokens], normalizer)
            tools.accelerator.backward(part)
        loss += float(part.detach())
        kl.append(kl_n.cpu())
        if logp_n is not None:
            logp.append(logp_n.cpu())
    return loss, torch.cat(kl), torch.cat(logp) if logp else None


def total(accelerator: Accelerator, count: int) -> int:
    """The sum of a number over all processes."""
    return int(accelerator.reduce(torch.tensor(count, device=accelerator.device), reduction="sum"))


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """To the bit the value itself where there is one process."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, dtype=torch.float32, device=accelerator.device), reduction="mean"))


def anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process, so that all of them decide alike."""
    return total(accelerator, int(flag)) > 0


def finite(scores: Sequence[Scores]) -> bool:
    """Whether all of the teacher's numbers are finite."""
    return all(bool(x.isfinite().all()) for score in scores for x in (score.hidden_NG, *score.logp_N.values()))
