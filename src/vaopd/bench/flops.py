"""Arithmetic of a step in floating-point operations (a multiply-add is two), from a Qwen3-VL configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Load:
    """What goes through a model in one pass."""

    decoder_tokens: int
    attended: int  # (query, key) pairs of one head of one layer
    patches: tuple[int, ...]  # of each picture
    head_rows: int


def shared_load(P: int, lengths: Sequence[int], patches: int) -> Load:
    """One packed row: the prompt once, every sibling behind it without its last token."""
    own = [length - 1 for length in lengths]
    attended = triangle(P) + sum(T * P + triangle(T) for T in own)
    return Load(P + sum(own), attended, (patches,), sum(lengths))


def rows_load(P: int, lengths: Sequence[int], patches: int) -> Load:
    """One row per sibling, padded to the longest."""
    longest, K = P + max(lengths) - 1, len(lengths)
    return Load(K * longest, K * triangle(longest), (patches,) * K, sum(lengths))


def triangle(n: int) -> int:
    """Pairs of a causal row."""
    return n * (n + 1) // 2


def decoder_flops(config: Any, load: Load) -> int:
    """Projections, gated MLP and attention of all layers."""
    text = config.get_text_config()
    queries, keys = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    weights = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    return text.num_hidden_layers * (2 * load.decoder_tokens * weights + 4 * load.attended * queries)


def head_flops(config: Any, load: Load) -> int:
    """One product of the response tokens' states with the head."""
    text = config.get_text_config()
    return 2 * load.head_rows * text.hidden_size * text.vocab_size


def vision_flops(config: Any, load: Load) -> int:
    """Patch embedding, blocks, and the mergers: one at the end and one per DeepStack level."""
    vision = config.vision_config
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = 4 * width**2 + 2 * width * vision.intermediate_size
    mergers = (1 + len(vision.deepstack_visual_indexes)) * (merged**2 + merged * vision.out_hidden_size)
    total = 0
    for n in load.patches:
        total += 2 * n * (pixels * width + vision.depth * block)
        total += 4 * n**2 * width * vision.depth
        total += 2 * (n // vision.spatial_merge_size**2) * mergers
    return total


def step_flops(student: Any, teacher: Any, load: Load, *, views: int, log_probs: bool) -> int:
    """Teacher under `views`, the loss, the student's forward and backward with a frozen vision tower.

    A backward costs twice its forward: the gradients of activations and of weights. The loss multiplies by the teacher's head once and
    by the student's three times; log-probabilities cost one product with the teacher's head per view.
    """
    scoring = views * (decoder_flops(teacher, load) + vision_flops(teacher, load))
    heads = (1 + (views if log_probs else 0)) * head_flops(teacher, load) + 3 * head_flops(student, load)
    return scoring + heads + 3 * decoder_flops(student, load) + vision_flops(student, load)
