"""A small real processor: Qwen3-VL's class without its video half, a byte-level tokenizer, a ChatML template."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>"]  # added tokens all the same, as in Qwen3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["what colour is the image? how many degrees has the angle at A, user assistant\n\n"] * 4


class ImageOnlyProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without `video_processor`, which would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_tokenizer(special: list[str] | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE over 256 bytes and a few merges; `NOT_SPECIAL` are added tokens that aren't special."""
    special = SPECIAL if special is None else special
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **options})


def make_processor(template: str = TEMPLATE, tokenizer: Any = None) -> ImageOnlyProcessor:
    """Patches of 8 pixels merged 2 x 2: a 64 x 64 image is 16 image tokens; at least 32 x 32, at most 128 x 128 pixels are shown."""
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128})
    return ImageOnlyProcessor(image_processor, tokenizer or make_tokenizer(), chat_template=template)


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """An RGB image without structure: any change of a view shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of the image in a format of Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
