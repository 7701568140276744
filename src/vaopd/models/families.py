"""What differs between families of vision-language models: one class each, and one line of FAMILIES per model type.

Everything else is general. A family says which processor renders its prompts, which of the processor's tensors its vision tower reads,
how images of several prompts are encoded together, where its tokens stand (on one axis or on M-RoPE's three), what its forward wants to
know of each token, and whether siblings may share their prompt in a packed row. The tests hold each family to transformers' own forward,
and `docs/families.md` to both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from transformers import Gemma3Processor, Idefics3Processor, ProcessorMixin

from vaopd.errors import ModelError, did_you_mean
from vaopd.models import processors
from vaopd.types import Prompt

Images = Mapping[str, Tensor]  # what the processor makes of one prompt's images


class Family:
    """A family as most are: features in the placeholders' places, one position axis, a plain causal language model, a plain LM head.

    None of the model classes below caps or scales its logits, whatever the text configuration says, so the head is `lm_head` alone.
    """

    title: ClassVar[str]
    processor: ClassVar[type[ProcessorMixin]]  # needs no torchvision
    placeholders: ClassVar[str]  # how an image becomes placeholders, for the documentation
    reads: ClassVar[frozenset[str]] = frozenset({"pixel_values"})  # what `get_image_features` is given of the processor's tensors
    axes: ClassVar[int] = 1  # of the position ids
    not_shared: ClassVar[str | None] = None  # why siblings can never share their prompt

    def placeholder_id(self, processor: Any) -> int:
        """The id that the processor writes wherever the model puts an image feature."""
        return int(processor.image_token_id)

    def encode_images(self, model: Any, prompts: Sequence[Prompt], images: Sequence[Images], repeats: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments that put each prompt's images (`images[b]`, encoded once) into `repeats[b]` consecutive rows.

        Raises:
            ModelError: the processor made a tensor that this family doesn't know, or the features don't fill the placeholders.
        """
        shown = [(prompt, view, repeat) for prompt, view, repeat in zip(prompts, images, repeats, strict=True) if view and repeat]
        if not shown:
            return {}
        for _, view, _ in shown:
            self._check_inputs(view)
        inputs = {name: self.join(name, [view[name] for _, view, _ in shown]).to(model.device) for name in sorted(self.reads)}
        features = model.get_image_features(**inputs, return_dict=True)
        tokens = [int((prompt.ids_P == model.config.image_token_id).sum()) for prompt, _, _ in shown]
        self.repeat(features, tokens, [repeat for _, _, repeat in shown])
        return {"mm_encoder_outputs": {"image": features}}

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """One tensor of the processor's, of several prompts, as the vision tower takes it in one call."""
        return torch.cat(list(parts))

    def repeat(self, features: Any, tokens: Sequence[int], repeats: Sequence[int]) -> None:
        """In place: features of prompts with `tokens[b]` placeholders, each `repeats[b]` times in a row."""
        features.pooler_output = repeat_features(features.pooler_output, tokens, repeats)

    def prompt_positions(self, model: Any, prompt: Prompt) -> Tensor:
        """(A, P) position ids of a prompt's tokens on the CPU; A axes. A response goes on at the maximum + 1 on every axis."""
        return torch.arange(len(prompt.ids_P)).expand(self.axes, -1)

    def token_inputs(self, model: Any, ids_RL: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the forward that say something of each token of the prompts (R, L), padding included."""
        return {}

    def _check_inputs(self, view: Images) -> None:
        if unknown := sorted(view.keys() - self.reads):
            raise ModelError(
                f"the image processor makes {', '.join(unknown)}, which {self.title} models are not known to read "
                f"(known: {', '.join(sorted(self.reads))}). Take the processor that belongs to the model"
            )
        if missing := sorted(self.reads - view.keys()):
            raise ModelError(f"the image processor makes no {', '.join(missing)}, which {self.title} models read. Take the model's own")


class _MRope(Family):
    """M-RoPE: a token's position has three axes; inside an image it counts time, rows and columns."""

    reads = frozenset({"pixel_values", "image_grid_thw"})
    axes = 3
    placeholders = "one per merged patch: t·h·w / merge²"

    def prompt_positions(self, model: Any, prompt: Prompt) -> Tensor:
        """(3, P); a text-only prompt counts up on all three axes."""
        view = next(iter(prompt.images.values()), None)
        if not view:
            return super().prompt_positions(model, prompt)
        ids = prompt.ids_P[None]
        types = (ids == model.config.image_token_id).long()
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=view["image_grid_thw"])
        return positions[:, 0]


class Qwen25VL(_MRope):
    """Qwen2.5-VL: window attention in the vision tower, which stays inside each image."""

    title = "Qwen2.5-VL"
    processor = processors.ImageOnlyQwen2_5_VLProcessor


class Qwen3VL(_MRope):
    """Qwen3-VL, dense and with experts: DeepStack features beside the image embeddings."""

    title = "Qwen3-VL"
    processor = processors.ImageOnlyQwen3VLProcessor

    def repeat(self, features: Any, tokens: Sequence[int], repeats: Sequence[int]) -> None:
        """The DeepStack levels too."""
        super().repeat(features, tokens, repeats)
        features.deepstack_features = [repeat_features(level, tokens, repeats) for level in features.deepstack_features]


class InternVL(Family):
    """InternVL 3 and 3.5 (`-HF`): an image is cut into tiles of one size and a thumbnail."""

    title = "InternVL"
    processor = processors.ImageOnlyInternVLProcessor
    placeholders = "`image_seq_length` per tile"


class Idefics3(Family):
    """SmolVLM of the first generation, which is an Idefics3: rows and columns of tiles with tokens of their own between them."""

    title = "SmolVLM (Idefics3)"
    processor: ClassVar[type[ProcessorMixin]] = Idefics3Processor
    placeholders = "`image_seq_len` per tile, `<row_i_col_j>` between them"
    reads = frozenset({"pixel_values", "pixel_attention_mask"})

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """As the tiles of one prompt, so that no padding of tiles is made up: the model would tell it by its zeros."""
        return torch.cat(list(parts), dim=1)


class SmolVLM(Idefics3):
    """SmolVLM2."""

    title = "SmolVLM2"
    processor = processors.ImageOnlySmolVLMProcessor


class Gemma3(Family):
    """Gemma 3: the tokens of an image see one another in both directions, and most layers look through a sliding window."""

    title = "Gemma 3"
    processor = Gemma3Processor
    placeholders = "`image_seq_length` per image, `<start_of_image>` before them"
    not_shared = "its image tokens see what comes after them"

    def placeholder_id(self, processor: Any) -> int:
        """The soft token; what the processor calls its image token is the one that it expands."""
        return int(processor.tokenizer.image_token_id)

    def token_inputs(self, model: Any, ids_RL: Tensor) -> dict[str, Tensor]:
        """Which tokens are an image's: without it they would be attended causally, and nothing would say so."""
        return {"token_type_ids": (ids_RL == model.config.image_token_id).long()}


class LlavaOnevision(Family):
    """LLaVA-OneVision: an image alone is cut into tiles, whose features are put together and cut to its shape; several are not."""

    title = "LLaVA-OneVision"
    processor = processors.ImageOnlyLlavaOnevisionProcessor
    placeholders = "from the image's sides: features of the whole, of the tiles, and of line ends"
    reads = frozenset({"pixel_values", "image_sizes", "batch_num_images"})

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Tiles (image, tile, channel, height, width) are padded to the largest number; the model takes as many as the size says."""
        if name != "pixel_values":
            return super().join(name, parts)
        most = max(tiles.shape[1] for tiles in parts)
        return torch.cat([F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - tiles.shape[1])) for tiles in parts])


_QWEN3_VL = Qwen3VL()
FAMILIES: dict[str, Family] = {  # by the `model_type` of config.json
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "internvl": InternVL(),
    "idefics3": Idefics3(),
    "smolvlm": SmolVLM(),
    "gemma3": Gemma3(),
    "llava_onevision": LlavaOnevision(),
}


def family_of(model: Any) -> Family:
    """The family of a model or a configuration. Raises ModelError when it isn't supported."""
    return family_named(getattr(model, "config", model).model_type)


def family_named(model_type: str) -> Family:
    """The family of a `model_type`. Raises ModelError when it isn't supported."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        hint = did_you_mean(model_type, FAMILIES)
        raise ModelError(
            f"models of type '{model_type}' are not supported.{hint} Supported: {', '.join(FAMILIES)}, in transformers' own format: no "
            "code that comes with a checkpoint is run (of InternVL take one that ends in -HF). A family is one class in "
            "vaopd/models/families.py"
        ) from None


def vision_parameters(model: Any) -> list[Parameter]:
    """What stands before the decoder: the vision tower and what projects and joins its features."""
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    return [parameter for parameter in model.model.parameters() if id(parameter) not in decoder]


def position_ids(positions_ARL: Tensor) -> Tensor:
    """As a model's forward takes them: (A, R, L) with several axes, (R, L) with one."""
    return positions_ARL if len(positions_ARL) > 1 else positions_ARL[0]


def repeat_features(features: Tensor | Sequence[Tensor], tokens: Sequence[int], repeats: Sequence[int]) -> Tensor | list[Tensor]:
    """Features of several prompts, in pieces of any kind, as (tokens, H) with each prompt's part `repeats[b]` times in a row.

    A tensor stays one, a sequence of tensors becomes a list, as the model classes distinguish them. Raises ModelError when there are not
    as many features as `tokens`, the placeholders of each prompt, ask for.
    """
    flat = (features if isinstance(features, Tensor) else torch.cat(list(features))).flatten(0, -2)
    if len(flat) != sum(tokens):
        raise ModelError(
            f"the vision tower makes {len(flat)} features for {sum(tokens)} image tokens: the processor belongs to another model, or an "
            "image of a single colour was taken for padding. Take the processor that belongs to the model, and leave out blank images"
        )
    rows = [part for part, repeat in zip(flat.split(list(tokens)), repeats, strict=True) for _ in range(repeat)]
    return torch.cat(rows) if isinstance(features, Tensor) else rows
