"""What is measured: shapes, small Qwen3-VL models, prompts and responses. Weights, pixels and ids are random: no time depends on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt

PATCH, MERGE, FRAMES = 16, 2, 2
MOST_SIDE = 8  # image tokens along one side of the picture, where the prompt has room for them
LEAST_PROMPT = 12  # a start, an image of one token between its marks, some text
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Shape:
    """One prompt with K responses."""

    P: int  # prompt tokens, image tokens included
    T: int  # response tokens; ragged lengths have this mean
    K: int

    def lengths(self, ragged: bool) -> list[int]:
        """K lengths: all T, or evenly spread over T/2 … 3T/2 with the same sum."""
        if not ragged or self.K == 1:
            return [self.T] * self.K
        spread = [round(self.T * (0.5 + k / (self.K - 1))) for k in range(self.K)]
        return [*spread[:-1], self.T * self.K - sum(spread[:-1])]


@dataclass(frozen=True)
class Size:
    """Widths and depths of a model; every head of the decoder is 32 wide."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    mlp: int
    vision_hidden: int
    vision_layers: int

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.key_heads} heads"
        return f"{self.layers} layers of {self.hidden} ({heads}, MLP {self.mlp}), vision {self.vision_layers} of {self.vision_hidden}"


STUDENT = Size(hidden=128, layers=4, heads=4, key_heads=2, mlp=384, vision_hidden=64, vision_layers=3)
TEACHER = Size(hidden=256, layers=8, heads=8, key_heads=2, mlp=768, vision_hidden=96, vision_layers=4)


@dataclass(frozen=True)
class Plan:
    """Everything that one run of the benchmark measures."""

    shapes: tuple[Shape, ...] = (Shape(312, 48, 4), Shape(112, 64, 4), Shape(112, 256, 4))
    vocab: int = 16_384
    losses: tuple[tuple[int, int], ...] = ((1024, 32_768), (512, 151_936))  # (N, V)
    memory: tuple[int, tuple[int, ...]] = (512, (16_384, 32_768, 65_536, 151_936))  # N, and the V over which memory is measured
    loss_hidden: tuple[int, int] = (256, 512)  # of student and teacher
    rounds: int = 5
    student: Size = STUDENT
    teacher: Size = TEACHER


@dataclass(frozen=True)
class Setting:
    """What a step of the benchmark works on."""

    student: Any
    teacher: Any
    groups: tuple[Group, ...]
    vocab: int


def top_ids(vocab: int) -> dict[str, int]:
    """The control ids of the random models: the last of the vocabulary."""
    return {name: vocab - 1 - index for index, name in enumerate(SPECIAL)}


def model_config(size: Size, vocab: int, ids: Mapping[str, int] | None = None) -> Qwen3VLConfig:
    """A Qwen3-VL of this size, with tied embeddings as the 2B has them."""
    control: dict[str, Any] = dict(ids or top_ids(vocab))
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    text = {
        "vocab_size": vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "head_dim": 32,
        "rope_parameters": rope,
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "out_hidden_size": size.hidden,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": (MERGE * MOST_SIDE) ** 2,
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **control)


def build_model(config: Qwen3VLConfig, seed: int, *, attention: str = "sdpa") -> Any:
    """Random weights in fp32, in evaluation mode, the vision tower frozen as in training by default."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    # With the small initial embeddings both models predict nearly the same uniform distribution, and the gradient would be the
    # rounding error of a difference.
    model.get_input_embeddings().weight.data.mul_(5.0)
    model.model.visual.requires_grad_(False)
    return model.eval()


def make_prompt(shape: Shape, vocab: int, seed: int = 0) -> Prompt:
    """P tokens: text, one square picture between its marks, text; both views."""
    side = image_side(shape.P)
    return random_prompt(shape.P, (side, side), top_ids(vocab), vocab - 8, seed)


def random_prompt(tokens: int, image: tuple[int, int], ids: Mapping[str, int], texts: int, seed: int = 0) -> Prompt:
    """`tokens` tokens, of which `image` (height × width) show a picture and the text is below `texts`."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image
    text = torch.randint(0, texts, (tokens - height * width - 2,), generator=generator)
    picture = torch.full((height * width,), ids["image_token_id"])
    start, end = (torch.tensor([ids[name]]) for name in ("vision_start_token_id", "vision_end_token_id"))
    grid = torch.tensor([[1, height * MERGE, width * MERGE]])
    pixels = torch.randn(int(grid.prod()), 3 * FRAMES * PATCH**2, generator=generator)
    views = {ORIGINAL: pixels, DEGRADED: 0.3 * pixels}
    images = {view: {"pixel_values": values, "image_grid_thw": grid} for view, values in views.items()}
    return Prompt(f"prompt {seed}", torch.cat([text[:4], start, picture, end, text[4:]]), images)


def image_side(prompt_tokens: int) -> int:
    """Image tokens along one side: MOST_SIDE, or what leaves room for some text."""
    return max(1, min(MOST_SIDE, isqrt(max(prompt_tokens - LEAST_PROMPT, 1))))


def make_group(shape: Shape, vocab: int, *, ragged: bool = False, seed: int = 0) -> Group:
    """One prompt with K random responses."""
    return random_group(make_prompt(shape, vocab, seed), shape.lengths(ragged), vocab - 8, seed)


def random_group(prompt: Prompt, lengths: Sequence[int], texts: int, seed: int = 0) -> Group:
    """Responses of these lengths, of ids below `texts`."""
    generator = torch.Generator().manual_seed(seed + 1)
    responses = tuple(torch.randint(0, texts, (length,), generator=generator) for length in lengths)
    return Group(prompt, responses, tuple(True for _ in lengths))


def make_models(plan: Plan) -> tuple[Any, Any]:
    """(student, teacher)."""
    student, teacher = (build_model(model_config(size, plan.vocab), seed) for seed, size in enumerate((plan.student, plan.teacher)))
    return student, teacher.requires_grad_(False)
