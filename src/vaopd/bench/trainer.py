"""A whole training step, generation included, against TRL's DistillationTrainer on the same models, prompt, K and lengths.

TRL draws one response per prompt; here its sampler repeats each prompt K times, which is how K rollouts are had from it. It runs its own
loop, in which every one of its steps is followed by one of ours, so the variants take turns. What counts for TRL is the time between
`on_step_begin` and `on_step_end`: decoding the picture, which its data loader does before, is left out; ours is counted.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from transformers import PrinterCallback, Qwen2VLImageProcessorPil, TrainerCallback

from vaopd.bench.baseline import DEADBAND
from vaopd.bench.shapes import FRAMES, MERGE, MOST_SIDE, PATCH, Plan, Shape, build_model, image_side, model_config
from vaopd.bench.step import BOTH_VIEWS, NO_VIEWS, WHOLE
from vaopd.bench.timing import Ratio, Times, measure, over
from vaopd.core import OPD, VAOPD, Weighting
from vaopd.data.images import png_bytes
from vaopd.data.render import Renderer
from vaopd.models.processors import ImageOnlyQwen3VLProcessor
from vaopd.models.shared_prompt import Auto
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.teachers.local import LocalTeacher
from vaopd.train.step import StudentLoss, Tools, train_step
from vaopd.types import ORIGINAL, Example
from vaopd.views import view
from vaopd.world.tiny import CHAT_TEMPLATE, build_tokenizer

PEERS = ("trl", "datasets")
WORD = "outline"  # one token
RATE, CLIP = 1e-5, 1.0


@dataclass(frozen=True)
class TrainerResult:
    """Steps of one prompt with K responses of T tokens."""

    shape: Shape  # P as the processor rendered it
    times: dict[str, Times]  # "trl opd", "opd", "va"

    def over_trl(self, ours: str) -> Ratio:
        return over(self.times[ours], self.times["trl opd"])


@dataclass(frozen=True)
class World:
    """What both trainers are given."""

    processor: Any
    student: Any  # never trained: take a copy
    teacher: Any
    example: Example
    image: Image.Image
    shape: Shape
    vocab: int
    control: tuple[int, ...]  # ids that are never sampled; the end of a turn among them, so that all responses have T tokens


def installed() -> bool:
    """Whether TRL is."""
    return all(importlib.util.find_spec(name) for name in PEERS)


def make_world(plan: Plan) -> World:
    """The first shape of the plan, with a processor, a picture and a question."""
    shape, side = plan.shapes[0], image_side(plan.shapes[0].P)
    processor = make_processor(side)
    ids = processor.tokenizer.convert_tokens_to_ids
    special = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    student, teacher = (
        build_model(model_config(size, plan.vocab, special), seed) for seed, size in enumerate((plan.student, plan.teacher))
    )
    control = tuple(sorted({*special.values(), processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}))
    for model in (student, teacher):
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    rng, pixels = random.Random(0), side * MERGE * PATCH
    image = Image.frombytes("RGB", (pixels, pixels), rng.randbytes(3 * pixels**2))
    example, tokens = fitting_example(processor, image, shape.P)
    return World(processor, student, teacher, example, image, Shape(tokens, shape.T, shape.K), plan.vocab, control)


def make_processor(side: int) -> ImageOnlyQwen3VLProcessor:
    """For pictures of side × side image tokens."""
    assert side <= MOST_SIDE
    area = (side * MERGE * PATCH) ** 2
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=FRAMES, size={"shortest_edge": area, "longest_edge": area}
    )
    return ImageOnlyQwen3VLProcessor(images, build_tokenizer([WORD]), chat_template=CHAT_TEMPLATE)


def fitting_example(processor: Any, image: Image.Image, prompt_tokens: int) -> tuple[Example, int]:
    """A question as long as the prompt has to be, and the tokens that it came to."""
    render = Renderer(processor)

    def with_words(count: int) -> Example:
        return Example("bench", (png_bytes(image),), " ".join([WORD] * count))

    shortest = len(render(with_words(1)).ids_P)
    example = with_words(1 + max(prompt_tokens - shortest, 0))
    return example, len(render(example).ids_P)


def package_trainer(world: World, weighting: Weighting, views: tuple[str, ...]) -> Callable[[], Any]:
    """One training step of the package per call: the prompt is rendered, answered, scored and learned from."""
    student = copy.deepcopy(world.student).train()
    forward = Auto()
    loss = StudentLoss(student, vocab_size=world.vocab, forward=forward, loss="reverse_kl")
    optimizer = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=RATE)
    ends = [world.processor.tokenizer.eos_token_id]
    tools = Tools(
        engine=HFEngine(student, Sampling(world.shape.T), vocab_size=world.vocab, eos_ids=ends, forbidden_ids=world.control),
        teacher=LocalTeacher(world.teacher, vocab_size=world.vocab, forward=forward, tokens_per_forward=WHOLE),
        student_loss=loss,
        optimizer=optimizer,
        accelerator=Accelerator(cpu=True),
        views=views,
        k=world.shape.K,
        deadband=DEADBAND,
        clip=CLIP,
        tokens_per_forward=WHOLE,
    )
    render = Renderer(world.processor, view("pixelate"))
    return lambda: train_step([render(world.example, views or (ORIGINAL,))], 1, weighting, tools)


class _Turns(TrainerCallback):
    """Times each step of TRL and has ours follow it."""

    def __init__(self, ours: dict[str, Callable[[], Any]]) -> None:
        self.ours = ours
        self.seconds: dict[str, list[float]] = {name: [] for name in ("trl opd", *ours)}
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds["trl opd"].append(time.process_time() - self.began)
        for name, run in self.ours.items():
            self.seconds[name].append(measure(run))


def measure_trainers(plan: Plan) -> TrainerResult | None:
    """None when TRL is not installed. The first step of each is to warm up."""
    if not installed():
        return None
    world = make_world(plan)
    ours = {"opd": package_trainer(world, OPD(), NO_VIEWS), "va": package_trainer(world, VAOPD(), BOTH_VIEWS)}
    turns = _Turns(ours)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        trainer = trl_trainer(world, folder, plan.rounds + 1, turns)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return TrainerResult(world.shape, {name: Times(tuple(seconds[1:])) for name, seconds in turns.seconds.items()})


def trl_trainer(world: World, folder: str, steps: int, callback: TrainerCallback) -> Any:
    """Reverse KL, one update per K rollouts, no gradient checkpointing, fp32, the vision tower frozen: as ours."""
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer.utils import RepeatSampler

    K = world.shape.K

    class RepeatingTrainer(DistillationTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            source = self.train_dataset if dataset is None else dataset
            return RepeatSampler(source, mini_repeat_count=K, batch_size=1, repeat_count=1, shuffle=False, seed=0)

    config = DistillationConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=K,
        gradient_accumulation_steps=1,
        max_steps=steps,
        max_completion_length=world.shape.T,
        # Every response has T tokens; the other control ids are suppressed as in ours.
        generation_kwargs={"min_new_tokens": world.shape.T, "suppress_tokens": list(world.control)},
        gradient_checkpointing=False,
        learning_rate=RATE,
        max_grad_norm=CLIP,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    row = {"prompt": [{"role": "user", "content": world.example.problem}], "image": world.image}
    data = Dataset.from_list([row] * steps).cast_column("image", ImageColumn())
    return RepeatingTrainer(
        model=copy.deepcopy(world.student),
        teacher_model=world.teacher,
        args=config,
        train_dataset=data,
        processing_class=world.processor,
        callbacks=[callback],
    )
