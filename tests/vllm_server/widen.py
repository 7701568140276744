"""The built-in student with attention heads of 32 numbers in place of 16: the same function, in a shape that vLLM has a CPU kernel for.

The added numbers of queries, keys and values are zero. What depends on a head's width is set right: RMSNorm divides by the mean square
over 32 instead of 16 (a factor √2 in queries and keys), attention scales by 1/√32 instead of 1/√16 (one 1/√2), and the rotary
frequencies θ^(-2i/32) are those of width 16 with θ squared. In training the added weights get no gradient and stay zero.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaopd.models.load import load_model, open_source, save_model

WIDTH, WIDE = 16, 32


def widen(model: Any) -> Any:
    """A model of its own with the same answers."""
    config = copy.deepcopy(model.config)
    text = config.text_config
    text.head_dim = WIDE
    first, height, width = text.rope_parameters["mrope_section"]
    text.rope_parameters["mrope_section"] = [first + (WIDE - WIDTH) // 2, height, width]  # the added frequencies count time
    text.rope_parameters["rope_theta"] **= WIDE / WIDTH
    wide = type(model)(config)
    state = {name: _wide(name, tensor) for name, tensor in model.state_dict().items()}
    wide.load_state_dict(state)
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.eval()


def _wide(name: str, tensor: Tensor) -> Tensor:
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj", "v_proj"):
        return _spread(tensor, 0)
    if part == "o_proj":
        return _spread(tensor, 1)
    if part == "q_norm":
        return _spread(tensor, 0)
    if part == "k_norm":
        return _spread(tensor, 0) / 2**0.5
    return tensor


def _spread(tensor: Tensor, dim: int) -> Tensor:
    """Each head's two halves, which rotate against each other, with zeros behind each."""
    halves = tensor.unflatten(dim, (-1, 2, WIDTH // 2))
    return torch.cat([halves, torch.zeros_like(halves)], dim=dim + 2).flatten(dim, dim + 2)


if __name__ == "__main__":
    source = open_source("builtin:student")
    save_model(widen(load_model(source, dtype=torch.float32)), source.processor, Path(sys.argv[1]))
