"""A student and a teacher small enough for a test: real Qwen3-VL models with random weights, a real processor, drawn figures."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vaopd.config import RunConfig, parse_config
from vaopd.data.images import png_bytes
from vaopd.data.render import Renderer
from vaopd.data.sources import write_examples
from vaopd.models.load import Source, load_model, open_source, save_model
from vaopd.types import ORIGINAL, Example, Group, Prompt
from vaopd.views import view
from vaopd.world.draw import BOARD
from vaopd.world.phrases import texts
from vaopd.world.questions import sample_figure
from vaopd.world.tiny import Size, build_model, build_processor

STUDENT = Size(vision_hidden=32, vision_layers=2, hidden=48, layers=2)
TEACHER = Size(vision_hidden=48, vision_layers=2, hidden=96, layers=2)
# Ids that end a response besides the tokenizer's EOS: bytes that no English text has, so that one answer in two ends by itself.
ENDS = range(190, 240)


@dataclass(frozen=True)
class Pair:
    """Two models that agree, on disk and in memory; the models in memory are never trained: take a `fresh` one for that."""

    student_folder: Path
    teacher_folder: Path
    source: Source  # of the student
    student: Any
    teacher: Any
    renderer: Renderer

    @property
    def vocab_size(self) -> int:
        return self.source.vocab_size

    def fresh(self) -> Any:
        """A student of one's own."""
        return copy.deepcopy(self.student)


def make_pair(folder: Path) -> Pair:
    """Build, save and load both models."""
    processor = build_processor(texts(), side=32, background=BOARD)
    processor.image_processor.size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    for name, size, seed in (("student", STUDENT, 1), ("teacher", TEACHER, 2)):
        model = randomise(build_model(processor, size, side=32, seed=seed), seed)
        model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *ENDS]
        save_model(model, processor, folder / name)
    sources = [open_source(str(folder / name)) for name in ("student", "teacher")]
    student, teacher = (load_model(source, dtype=torch.float32) for source in sources)
    renderer = Renderer(sources[0].processor, view("pixelate"))
    return Pair(folder / "student", folder / "teacher", sources[0], student, teacher, renderer)


def randomise(model: Any, seed: int) -> Any:
    """Weights large enough that every token, position and pixel shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = 0.3 if "embed_tokens" in name else 1.5 * parameter[0].numel() ** -0.5
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A drawn figure in the given size."""
    return sample_figure(random.Random(seed)).image.resize((width, height))


def example(id_: str, problem: str, *images: Image.Image) -> Example:
    return Example(id_, tuple(png_bytes(image) for image in images), problem)


def mixed_examples() -> list[Example]:
    """Different grids, two images in one prompt, no image, two prompts of one grid."""
    return [
        example("square", "How long is the longest side?", picture(32, 32, 1)),
        example("wide", "Find the perimeter of the figure.", picture(64, 32, 2)),
        example("two", "<image> and <image> Find the length of the longest side.", picture(32, 48, 3), picture(48, 16, 4)),
        example("text", "How long is the whole outline?"),
        example("square again", "How long is the longest side?", picture(32, 32, 5)),
    ]


def random_responses(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, ...]:
    """Ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(240, 500, (length,), generator=generator) for length in lengths)


def make_group(prompt: Prompt, lengths: Sequence[int], seed: int = 0) -> Group:
    """Random responses of these lengths to a prompt."""
    return Group(prompt, random_responses(lengths, seed), tuple(True for _ in lengths))


def reference_states(model: Any, prompt: Prompt, response: Tensor, view_name: str = ORIGINAL) -> Tensor:
    """(T, H) what transformers computes for one row of its own: one whole forward, positions left to the model."""
    ids = torch.cat([prompt.ids_P, response])[None]
    images = prompt.images[view_name] if prompt.images else {}
    types = {"mm_token_type_ids": (ids == model.config.image_token_id).long()} if images else {}
    body = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **types, **images)
    return body.last_hidden_state[0, len(prompt.ids_P) - 1 : -1]


def reference_logits(model: Any, prompt: Prompt, response: Tensor, view_name: str = ORIGINAL) -> Tensor:
    """(T, V) the logits that predict one response, by transformers alone."""
    ids = torch.cat([prompt.ids_P, response])[None]
    images = prompt.images[view_name] if prompt.images else {}
    types = {"mm_token_type_ids": (ids == model.config.image_token_id).long()} if images else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **types, **images).logits
    return logits[0, len(prompt.ids_P) - 1 : -1]


def write_data(folder: Path, *, train: int = 6, evaluate: int = 3) -> dict[str, str]:
    """`train.jsonl` and `eval.jsonl` of drawn figures with answers and solutions."""
    paths = {}
    for name, size in (("train", train), ("eval", evaluate)):
        rng = random.Random(name)
        figures = [sample_figure(rng) for _ in range(size)]
        rows = [
            Example(f"{name}-{i}", (png_bytes(f.image.resize((32, 32))),), f.problem, f.answer, f.solution) for i, f in enumerate(figures)
        ]
        paths[name] = str(write_examples(rows, folder, name))
    return paths


def make_config(run: Path, pair: Pair, data: dict[str, str], /, **changes: Any) -> RunConfig:
    """A run of a few steps of two prompts with three siblings; `changes` replace whole values or, as dictionaries, parts of them."""
    values: dict[str, Any] = {
        "run": str(run),
        "method": "va_opd",
        "student": str(pair.student_folder),
        "teacher": str(pair.teacher_folder),
        "data": data,
        "rollouts": {"k": 3, "max_tokens": 6, "temperature": 1.0, "top_p": 1.0},
        "optim": {"lr": 1e-3, "prompts_per_step": 2, "steps": 4, "warmup": 0.25},
        "eval": {"every": 2, "k": 2, "samples": 2, "baselines": False},
        "precision": "fp32",
        "trackers": [],
    }
    for key, change in changes.items():
        values[key] = {**values[key], **change} if isinstance(change, dict) and isinstance(values.get(key), dict) else change
    return parse_config(values)
