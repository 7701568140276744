"""What differs between families of vision-language models. A family is one entry of FAMILIES; everything else is general."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vaopd.errors import ModelError, did_you_mean
from vaopd.types import Prompt


class Family(Protocol):
    """What the forward pass has to know about a model beyond transformers' common interface."""

    def encode_images(self, model: Any, images: Sequence[Mapping[str, Tensor]], repeats: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments that put each prompt's images (`images[b]`, encoded once) into `repeats[b]` consecutive rows."""
        ...

    def prompt_positions(self, model: Any, prompt: Prompt) -> Tensor:
        """(A, P) position ids of a prompt's tokens on the CPU; A axes. A response goes on at the maximum + 1 on every axis."""
        ...


class Qwen3VL:
    """Qwen3-VL, dense: M-RoPE on three axes, DeepStack features beside the image embeddings."""

    def encode_images(self, model: Any, images: Sequence[Mapping[str, Tensor]], repeats: Sequence[int]) -> dict[str, Any]:
        """The vision tower runs once per image; its features are repeated for the siblings."""
        shown = [(view, repeat) for view, repeat in zip(images, repeats, strict=True) if view]
        if not shown:
            return {}
        device = model.device
        pixels = torch.cat([view["pixel_values"] for view, _ in shown]).to(device)
        grid = torch.cat([view["image_grid_thw"] for view, _ in shown]).to(device)
        features = model.get_image_features(pixels, grid, return_dict=True)
        # One entry per image; the images of a prompt stay together and in order in each of its rows.
        counts = [len(view["image_grid_thw"]) for view, _ in shown]
        order: list[int] = []
        first = 0
        for count, (_, repeat) in zip(counts, shown, strict=True):
            order += list(range(first, first + count)) * repeat
            first += count
        features.pooler_output = tuple(features.pooler_output[index] for index in order)
        features.deepstack_features = [tuple(level[index] for index in order) for level in features.deepstack_features]
        return {"mm_encoder_outputs": {"image": features}}

    def prompt_positions(self, model: Any, prompt: Prompt) -> Tensor:
        """(3, P); a text-only prompt counts up on all three axes."""
        view = next(iter(prompt.images.values()), None)
        if not view:
            return torch.arange(len(prompt.ids_P)).expand(3, -1)
        ids = prompt.ids_P[None]
        types = (ids == model.config.image_token_id).long()
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=view["image_grid_thw"])
        return positions[:, 0]


FAMILIES: dict[str, Family] = {"qwen3_vl": Qwen3VL()}


def family_of(model: Any) -> Family:
    """The family of a model or a configuration. Raises ModelError when it isn't supported."""
    config = getattr(model, "config", model)
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        hint = did_you_mean(config.model_type, FAMILIES)
        raise ModelError(
            f"models of type '{config.model_type}' are not supported.{hint} Supported: {', '.join(FAMILIES)}. "
            "A family is one class in vaopd/models/families.py."
        ) from None
