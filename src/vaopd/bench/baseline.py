"""The baseline: a step as other trainers compute it, one row per rollout, each with its own prompt and its own run of the vision tower.

It is a fair one. The head sees response tokens alone, the last token of a row (which predicts nothing) is left out, the loss is the same
fused loss, the attention the same kernel of torch; plain OPD scores no log-probabilities, here as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vaopd.bench.shapes import Setting
from vaopd.core import OPD, VAOPD, fused_weighted_divergence, token_coefficients, token_log_probs, visual_advantage
from vaopd.models.forward import head_of
from vaopd.train.step import layout
from vaopd.types import DEGRADED, ORIGINAL, Group

DEADBAND = 1e-3  # of the advantage, as in training


def row_by_row(model: Any, groups: Sequence[Group], view: str) -> Tensor:
    """(N, H) what `vaopd.models.forward.rows` returns, with the pictures encoded once per row."""
    inputs = {key: x.to(model.device) for key, x in as_rows(groups, view, model.config.image_token_id).items()}
    states_RLH = model.model(**inputs, use_cache=False).last_hidden_state
    siblings = [(len(group.prompt.ids_P), len(response)) for group in groups for response in group.responses]
    return torch.cat([row[P - 1 : P - 1 + T] for row, (P, T) in zip(states_RLH, siblings, strict=True)])


def as_rows(groups: Sequence[Group], view: str, image_token: int) -> dict[str, Tensor]:
    """The model's inputs, right-padded; positions are left to the model, as everywhere else."""
    ids = [torch.cat([group.prompt.ids_P, response[:-1]]) for group in groups for response in group.responses]
    images = [group.prompt.images[view] for group in groups for _ in group.responses]
    ids_RL = pad_sequence(ids, batch_first=True)
    return {
        "input_ids": ids_RL,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "mm_token_type_ids": (ids_RL == image_token).long(),
        "pixel_values": torch.cat([image["pixel_values"] for image in images]),
        "image_grid_thw": torch.cat([image["image_grid_thw"] for image in images]),
    }


def baseline_step(setting: Setting, views: Sequence[str]) -> Tensor:
    """Teacher, coefficients, the student's forward and backward; with both views VA-OPD, with none OPD. Returns the loss."""
    student, teacher, groups = setting.student, setting.teacher, setting.groups
    heads = [head_of(model, setting.vocab) for model in (student, teacher)]
    student.zero_grad(set_to_none=True)
    with torch.no_grad():
        hidden_NG = row_by_row(teacher, groups, ORIGINAL)
        ids_N = torch.cat([group.ids_N for group in groups]).to(hidden_NG.device)
        if DEGRADED in views:
            degraded_NG = row_by_row(teacher, groups, DEGRADED)
            a_N = visual_advantage(*(token_log_probs(states, heads[1], ids_N) for states in (hidden_NG, degraded_NG)), deadband=DEADBAND)
        else:
            a_N = torch.zeros(len(ids_N))
    c_N = token_coefficients(a_N, *layout(groups), VAOPD() if DEGRADED in views else OPD())
    loss, _ = fused_weighted_divergence(row_by_row(student, groups, ORIGINAL), heads[0], hidden_NG, heads[1], c_N, normalizer=len(groups))
    loss.backward()
    return loss.detach()
