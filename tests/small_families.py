"""A tiny model of every family: transformers' own architecture and configuration class, a real processor, random weights, drawn figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from small_pair import example, picture, randomise
from vaopd.data.images import decode
from vaopd.data.render import Renderer
from vaopd.models.processors import (
    ImageOnlyInternVLProcessor,
    ImageOnlyLlavaOnevisionProcessor,
    ImageOnlyQwen2_5_VLProcessor,
    ImageOnlyQwen3VLProcessor,
    ImageOnlySmolVLMProcessor,
)
from vaopd.types import DEGRADED, Example
from vaopd.views import view

CORPUS = ["How long is the longest side? Find the perimeter of the figure. user assistant model User Assistant:\n"] * 4


@dataclass(frozen=True)
class Small:
    """One tiny model with what belongs to it."""

    model_type: str
    processor: Any
    model: Any

    @property
    def vocab_size(self) -> int:
        return len(self.processor.tokenizer)

    @property
    def renderer(self) -> Renderer:
        return Renderer(self.processor, view("pixelate"))


# --- tokenizers and templates -----------------------------------------------------------------------------------------


def make_tokenizer(special: Sequence[str], **named: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with these special tokens; the last one is a spare one, as real tokenizers have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [*special, "<|spare|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def chatml(image: str) -> str:
    """The template of Qwen's descendants, with `image` for each image."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SMOLVLM_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def chatml_tokenizer(special: Sequence[str], **extra: str) -> PreTrainedTokenizerFast:
    names: dict[str, Any] = {"extra_special_tokens": extra} if extra else {}
    return make_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special], eos_token="<|im_end|>", pad_token="<|endoftext|>", **names
    )


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return chatml_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])


QWEN_CHAT = chatml("<|vision_start|><|image_pad|><|vision_end|>")

# --- configurations ---------------------------------------------------------------------------------------------------


def text(tokenizer: Any, pad: int, hidden: int, **values: Any) -> dict[str, Any]:
    """A text configuration of two layers; the embedding has `pad` rows beyond the tokenizer's ids."""
    return {
        "vocab_size": len(tokenizer) + pad,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        **values,
    }


def mrope(hidden: int, **values: Any) -> dict[str, Any]:
    axis = hidden // 4 // 6
    section = [hidden // 8 - 2 * axis, axis, axis]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **values}}


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def vision(**values: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **values}


def qwen_images() -> Any:
    sizes = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=sizes)


def qwen2_5_vl(pad: int, hidden: int) -> tuple[Any, Any, Any]:
    processor = ImageOnlyQwen2_5_VLProcessor(qwen_images(), qwen_tokenizer(), chat_template=QWEN_CHAT)
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8, "window_size": 32}
    tower |= {"fullatt_block_indexes": [1], "out_hidden_size": hidden, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tokenizer = processor.tokenizer
    words = text(tokenizer, pad, hidden, tie_word_embeddings=False, **mrope(hidden))
    config = Qwen2_5_VLConfig(text_config=words, vision_config=tower, tie_word_embeddings=False, **qwen_ids(tokenizer))
    return processor, Qwen2_5_VLForConditionalGeneration, config


def qwen3_vl_parts(pad: int, hidden: int, **words: Any) -> tuple[Any, dict[str, Any]]:
    processor = ImageOnlyQwen3VLProcessor(qwen_images(), qwen_tokenizer(), chat_template=QWEN_CHAT)
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8, "temporal_patch_size": 2}
    tower |= {"out_hidden_size": hidden, "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    sizes = text(processor.tokenizer, pad, hidden, **mrope(hidden, mrope_interleaved=True), **words)
    return processor, {"text_config": sizes, "vision_config": tower, "tie_word_embeddings": True, **qwen_ids(processor.tokenizer)}


def qwen3_vl(pad: int, hidden: int) -> tuple[Any, Any, Any]:
    processor, values = qwen3_vl_parts(pad, hidden)
    return processor, Qwen3VLForConditionalGeneration, Qwen3VLConfig(**values)


def qwen3_vl_moe(pad: int, hidden: int) -> tuple[Any, Any, Any]:
    processor, values = qwen3_vl_parts(pad, hidden, **EXPERTS)
    return processor, Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig(**values)


def internvl(pad: int, hidden: int, **words: Any) -> tuple[Any, Any, Any]:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer = chatml_tokenizer(list(names.values()), **names)
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = ImageOnlyInternVLProcessor(images, tokenizer, image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>\n"))
    words = {"model_type": "qwen2", **text(tokenizer, pad, hidden), **words}
    tower = vision(image_size=[16, 16], patch_size=[4, 4])
    config = InternVLConfig(
        text_config=words,
        vision_config=tower,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return processor, InternVLForConditionalGeneration, config


def tiles_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|im_start|>", "<end_of_utterance>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"}
    return make_tokenizer(special, **names)


def idefics3_config(tokenizer: Any, kind: Any, pad: int, hidden: int, words: dict[str, Any]) -> Any:
    tower = vision(image_size=32, patch_size=8)
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id}
    text_config = {"model_type": "llama", **text(tokenizer, pad, hidden, bos_token_id=tokenizer.bos_token_id), **words}
    return kind(text_config=text_config, vision_config=tower, scale_factor=2, tie_word_embeddings=False, **ids)


def idefics3(pad: int, hidden: int) -> tuple[Any, Any, Any]:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tiles_tokenizer(), image_seq_len=4, chat_template=SMOLVLM_CHAT)
    return processor, Idefics3ForConditionalGeneration, idefics3_config(processor.tokenizer, Idefics3Config, pad, hidden, {})


def smolvlm(pad: int, hidden: int) -> tuple[Any, Any, Any]:
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = ImageOnlySmolVLMProcessor(images, tiles_tokenizer(), image_seq_len=4, chat_template=SMOLVLM_CHAT)
    return processor, SmolVLMForConditionalGeneration, idefics3_config(processor.tokenizer, SmolVLMConfig, pad, hidden, {})


def gemma3(pad: int, hidden: int) -> tuple[Any, Any, Any]:
    """A sliding window of 8 tokens, well below a prompt, in the first layer; full attention in the second."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *names.values()]
    tokenizer = make_tokenizer(special, eos_token="<end_of_turn>", bos_token="<bos>", pad_token="<pad>", extra_special_tokens=names)
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA_CHAT)
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": hidden // 4}
    ids = {f"{key}_index": tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    config = Gemma3Config(
        text_config=text(tokenizer, pad, hidden, **layers),
        vision_config=vision(image_size=32, patch_size=8),
        mm_tokens_per_image=4,
        image_token_index=ids["image_token_index"],
        boi_token_index=ids["boi_token_index"],
        eoi_token_index=ids["eoi_token_index"],
    )
    return processor, Gemma3ForConditionalGeneration, config


def llava_onevision(pad: int, hidden: int) -> tuple[Any, Any, Any]:
    tokenizer = chatml_tokenizer(["<image>", "<video>"])
    grids = [[16, 16], [16, 32], [32, 16], [32, 32]]
    images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=grids)
    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    processor = ImageOnlyLlavaOnevisionProcessor(images, tokenizer, chat_template=chatml("<image>\n"), **options)
    ids = tokenizer.convert_tokens_to_ids
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text(tokenizer, pad, hidden)},
        vision_config={"model_type": "siglip_vision_model", **vision(image_size=16, patch_size=4, vision_use_head=False)},
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=grids,
        tie_word_embeddings=False,
    )
    return processor, LlavaOnevisionForConditionalGeneration, config


BUILDERS: dict[str, Callable[[int, int], tuple[Any, Any, Any]]] = {
    build.__name__: build for build in (qwen2_5_vl, qwen3_vl, qwen3_vl_moe, internvl, idefics3, smolvlm, gemma3, llava_onevision)
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VARIANTS: dict[str, Callable[[int, int], tuple[Any, Any, Any]]] = {  # the language models of InternVL 3.5
    "internvl on qwen3": partial(internvl, model_type="qwen3"),
    "internvl on qwen3_moe": partial(internvl, model_type="qwen3_moe", **EXPERTS),
}


def make_small(name: str, *, pad: int = 0, hidden: int = 48, seed: int = 1) -> Small:
    """The tiny model of a type or a variant; `pad` rows of its head are beyond the tokenizer's ids."""
    processor, kind, config = {**BUILDERS, **VARIANTS}[name](pad, hidden)
    torch.manual_seed(seed)
    model = randomise(kind._from_config(config, attn_implementation="sdpa"), seed).eval()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return Small(config.model_type, processor, model)


# --- prompts, and transformers' own way to the logits -----------------------------------------------------------------


def small_examples() -> list[Example]:
    """One wide image, a square one, two in one prompt, none, and another one of the first's size: lengths, tiles and grids differ."""
    return [
        example("wide", "How long is the longest side?", picture(64, 32, 1)),
        example("square", "Find the perimeter.", picture(32, 32, 2)),
        example("two", "<image> and <image> which is the longest?", picture(32, 64, 3), picture(48, 32, 4)),
        example("text", "How long is the figure?"),
        example("wide again", "How long is the longest side?", picture(64, 32, 5)),
    ]


def plain_inputs(small: Small, sample: Example, view_name: str) -> dict[str, Tensor]:
    """The processor's own output for a prompt, of the images as the view has them: nothing of the package but the pixelation."""
    images: list[Image.Image] = [decode(source) for source in sample.images]
    if view_name == DEGRADED:
        images = small.renderer.degraded_images(sample)
    problem = sample.problem.split("<image>")
    content: list[dict[str, Any]] = []
    if len(problem) == 1:
        content = [{"type": "image"} for _ in images]
    for index, part in enumerate(problem):
        if index:
            content.append({"type": "image"})
        if part:
            content.append({"type": "text", "text": part})
    chat = small.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    bos = small.processor.tokenizer.bos_token
    options: dict[str, Any] = {"images": [images]} if images else {}
    if bos and chat.startswith(bos):
        options["add_special_tokens"] = False
    return dict(small.processor(text=[chat], return_tensors="pt", **options))


def plain_logits(small: Small, sample: Example, response: Tensor, view_name: str) -> Tensor:
    """(T, V) the logits that predict the response, from one whole forward with everything left to the model."""
    inputs = plain_inputs(small, sample, view_name)
    prompt_length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], response[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(response)))
    logits = small.model(**inputs, use_cache=False).logits[0, prompt_length - 1 : -1]
    return logits[:, : small.vocab_size]
