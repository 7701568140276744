"""Tiny vision-language models of the real Qwen3-VL architecture, and the supervised training that makes them.

A tiny vision tower stays at chance for thousands of steps when it has to learn reading from whole solutions. It learns to read from
a reading-only phase (a few tokens, all about the picture), and after that the solutions take a few hundred steps.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vaopd.models.processors import ImageOnlyQwen3VLProcessor
from vaopd.views import pixelate

PATCH, MERGE = 8, 2
STOP_BATCHES = 10
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# One token for a word with the space before it, one for every digit: as large tokenizers do, in a tiny vocabulary.
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Widths and depths of a tiny model."""

    vision_hidden: int
    vision_layers: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class Lesson:
    """A picture with a question and the text that answers it: one supervised sample."""

    image: Image.Image
    problem: str
    response: str


@dataclass(frozen=True)
class Phase:
    """One phase of supervised training: `steps` batches of lessons drawn from `sample`."""

    sample: Callable[[random.Random], Lesson]
    steps: int
    batch: int
    lr: float
    degraded: float = 0.0  # share of pictures shown pixelated, so that the model is calibrated when it cannot see
    ratio: float = 0.1  # of the pixelation
    stop_at: float | None = None  # ends the phase early, once this share of the digits is right: a mean over STOP_BATCHES batches


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's control tokens in which every word of `texts` is one token; any other text still encodes."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [piece for text in texts for piece in (text, f" {text}")]
    corpus += [f"{left}{digit}" for digit in range(10) for left in ("", " ")]
    tokenizer.train_from_iterator(sorted(set(corpus)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )


def build_processor(texts: Iterable[str], *, side: int, background: Sequence[int]) -> ImageOnlyQwen3VLProcessor:
    """Qwen3-VL's processor for square pictures of `side` pixels; `background` (RGB) maps to zero."""
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=1,
        size={"shortest_edge": side * side, "longest_edge": side * side},
        image_mean=[channel / 255 for channel in background],
        image_std=[0.5, 0.5, 0.5],
    )
    return ImageOnlyQwen3VLProcessor(image_processor, build_tokenizer(texts), chat_template=CHAT_TEMPLATE)


def build_model(processor: ImageOnlyQwen3VLProcessor, size: Size, *, side: int, seed: int) -> Qwen3VLForConditionalGeneration:
    """A freshly initialised Qwen3-VL of this size in fp32."""
    torch.manual_seed(seed)
    ids = processor.tokenizer.convert_tokens_to_ids
    head_dim = size.hidden // 4
    axis = head_dim // 6
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": size.hidden,
            "intermediate_size": size.hidden * 3,
            "num_hidden_layers": size.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": head_dim,
            "max_position_embeddings": 1024,
            "pad_token_id": processor.tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 2 - 2 * axis, axis, axis],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_hidden * 3,
            "num_heads": 4,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "spatial_merge_size": MERGE,
            "out_hidden_size": size.hidden,
            "num_position_embeddings": (side // PATCH) ** 2,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def _batch(processor: ImageOnlyQwen3VLProcessor, lessons: Sequence[Lesson]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs of right-padded lessons and their labels (-100 outside the response)."""
    tokenizer = processor.tokenizer
    images = processor.image_processor([lesson.image for lesson in lessons], return_tensors="pt")
    counts = images["image_grid_thw"].prod(-1) // MERGE**2
    rows, starts = [], []
    for lesson, count in zip(lessons, counts.tolist(), strict=True):
        prompt = (
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{lesson.problem}<|im_end|>\n<|im_start|>assistant\n"
        )
        starts.append(len(tokenizer(prompt).input_ids))
        rows.append(torch.tensor(tokenizer(f"{prompt}{lesson.response}<|im_end|>").input_ids))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    position = torch.arange(ids.shape[1])
    lengths = torch.tensor([len(row) for row in rows])
    inside = position < lengths[:, None]
    labels = ids.masked_fill(~inside | (position < torch.tensor(starts)[:, None]), -100)
    types = (ids == processor.image_token_id).long()
    return {"input_ids": ids, "attention_mask": inside.long(), "mm_token_type_ids": types, **images}, labels


def _draw(phase: Phase, rng: random.Random) -> Lesson:
    lesson = phase.sample(rng)
    if rng.random() >= phase.degraded:
        return lesson
    return Lesson(pixelate(lesson.image, phase.ratio), lesson.problem, lesson.response)


def teach(
    model: Qwen3VLForConditionalGeneration,
    processor: ImageOnlyQwen3VLProcessor,
    phase: Phase,
    *,
    seed: int,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Train on one phase by teacher forcing: AdamW, 100 steps of warm-up, cosine to a tenth, clipping at 1."""
    rng = random.Random(seed)
    digits_V = torch.tensor(
        [text.strip().isdigit() for text in processor.tokenizer.batch_decode([[i] for i in range(len(processor.tokenizer))])]
    )
    recent: deque[float] = deque(maxlen=STOP_BATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, weight_decay=0.01, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / phase.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step in range(1, phase.steps + 1):
        lessons = [_draw(phase, rng) for _ in range(phase.batch)]
        inputs, labels = _batch(processor, lessons)
        keep = labels[:, 1:] != -100
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][keep]
        logits, targets = model.lm_head(hidden), labels[:, 1:][keep]
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = logits.argmax(-1) == targets
        is_digit = digits_V[targets]
        recent.append(float(right[is_digit].float().mean()) if is_digit.any() else 0.0)
        stop = phase.stop_at is not None and len(recent) == STOP_BATCHES and sum(recent) / STOP_BATCHES >= phase.stop_at
        if step % 50 == 0 or step == phase.steps or stop:
            digits = sum(recent) / len(recent)
            log(
                {
                    "step": step,
                    "loss": round(loss.item(), 4),
                    "tokens_correct": round(float(right.float().mean()), 4),
                    "digits": round(digits, 4),
                }
            )
        if stop:
            break
    model.eval()
