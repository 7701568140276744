"""How much arithmetic a step is, and how long a run takes at least: from configurations and a device's published figures.

Scoring and training are limited by arithmetic, of which a good run reaches about 40 %. Decoding is limited by memory: every token of the
rollouts side by side reads all weights once. Both shares are assumptions and are printed with the estimate.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from vaopd.bench.flops import Load, rows_load, shared_load, step_flops
from vaopd.config import RunConfig
from vaopd.errors import ConfigError, did_you_mean
from vaopd.evaluate.held_out import CONDITIONS
from vaopd.preflight.memory import BF16, FP32, Model, Work, reads_twice, shares

ARITHMETIC, BANDWIDTH = 0.4, 0.6  # shares of a device's peaks that are reached


@dataclass(frozen=True)
class Device:
    """What a run is planned for."""

    name: str
    memory: int  # bytes
    flops: float | None  # per second, dense bf16 on a GPU; None: unknown
    bandwidth: float | None  # bytes per second

    @property
    def gpu(self) -> bool:
        return self.name != "cpu"


# Dense bf16 TFLOP/s, GB/s and GB, from the makers' data sheets.
_SHEETS = {
    "L4": (121, 300, 24),
    "RTX 4090": (165, 1008, 24),
    "L40S": (362, 864, 48),
    "A100": (312, 2039, 80),
    "H100": (989, 3350, 80),
    "H200": (989, 4800, 141),
    "B200": (2250, 8000, 192),
}
DEVICES = {name: Device(name, memory * 10**9, 1e12 * flops, 1e9 * bandwidth) for name, (flops, bandwidth, memory) in _SHEETS.items()}


def device_named(name: str) -> Device:
    """Raises ConfigError for one that isn't listed."""
    found = {key.casefold(): device for key, device in DEVICES.items()}.get(name.casefold())
    if found is None:
        raise ConfigError(f"no figures are known of device '{name}'.{did_you_mean(name, DEVICES)} Known: {', '.join(DEVICES)}")
    return found


def this_device() -> Device:
    """The GPU here, else the CPU and its memory."""
    if torch.cuda.is_available():
        card, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        sheet = max((device for name, device in DEVICES.items() if name in card), key=lambda device: len(device.name), default=None)
        return Device(card, memory, sheet.flops if sheet else None, sheet.bandwidth if sheet else None)
    return Device("cpu", _physical_memory(), None, None)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Cost:
    """Of one step, of all processes together."""

    scoring_and_training: int  # floating-point operations
    decoding: int
    seconds: float | None  # at least; None where the device's figures are not known

    @property
    def flops(self) -> int:
        return self.scoring_and_training + self.decoding


def step_cost(recipe: RunConfig, student: Model, teacher: Model | None, work: Work, device: Device, *, processes: int = 1) -> Cost:
    """Every answer taken as `work.response` tokens long."""
    prompts, k = recipe.optim.prompts_per_step, 1 if recipe.method.off_policy else recipe.rollouts.k
    lengths = [work.response] * k
    load = (shared_load if shares(recipe, student, work, k) else rows_load)(work.prompt, lengths, work.patches)
    views = 1 + reads_twice(recipe) if teacher and recipe.loss != "nll" else 0
    group = _step_flops(student, teacher if views else None, load, views)
    prefill, tokens = student.decoder * work.prompt + student.vision * work.patches, student.decoder * k * work.response
    decoding = 0 if recipe.method.off_policy else 2 * (prefill + tokens)
    seconds = None
    if device.flops and device.bandwidth:
        seconds = prompts * (group + 2 * prefill) / (ARITHMETIC * device.flops) / processes
        if decoding:
            seconds += _decoding(recipe, _student_bytes(recipe, student), math.ceil(prompts / processes), k, device.bandwidth)
    return Cost(prompts * group, prompts * decoding, seconds)


def evaluation_seconds(
    recipe: RunConfig, student: Model, teacher: Model | None, device: Device, *, steps: int, held_out: int, test: int
) -> float | None:
    """Decoding of all evaluations of a run, every answer as long as it may be; None where the device's figures are not known.

    Args:
        held_out, test: questions, taken to have answers: then the final evaluation asks all of them seeing and twice blind.
    """
    if device.bandwidth is None:
        return None
    asked, k = min(recipe.eval.questions or held_out, held_out), recipe.eval.k
    times = 1 + math.ceil(steps / recipe.eval.every)  # before the first step, and after the last
    of_student = _student_bytes(recipe, student)
    models = [of_student]
    if recipe.eval.baselines:
        models += [of_student, *([teacher.parameters * BF16] if teacher else [])]
    during = times * _decoding(recipe, of_student, asked, k, device.bandwidth)
    return during + CONDITIONS * sum(_decoding(recipe, size, test, k, device.bandwidth) for size in models)


def _student_bytes(recipe: RunConfig, student: Model) -> int:
    return student.parameters * (BF16 if recipe.lora else FP32)


def _decoding(recipe: RunConfig, weights: int, prompts: int, k: int, bandwidth: float) -> float:
    """Seconds to decode k answers of the greatest length to each prompt: every token of a round reads the weights once."""
    rounds = math.ceil(prompts / max(1, recipe.rollouts.rows // k))
    return rounds * recipe.rollouts.max_tokens * weights / (BANDWIDTH * bandwidth)


def _step_flops(student: Model, teacher: Model | None, load: Load, views: int) -> int:
    """As `vaopd.bench.flops` counts Qwen3-VL; of other families by parameters: two operations each and token, four more in a backward."""
    try:
        return step_flops(student.config, (teacher or student).config, load, views=views, log_probs=views > 1)
    except AttributeError:
        return _by_parameters(student, teacher, load, views)


def _by_parameters(student: Model, teacher: Model | None, load: Load, views: int) -> int:
    def once(model: Model) -> int:
        return 2 * (model.decoder * load.decoder_tokens + model.vision * sum(load.patches) + _head(model) * load.head_rows)

    return 3 * once(student) + (views * once(teacher) if teacher else 0)


def _head(model: Any) -> int:
    return model.text.vocab_size * model.text.hidden_size
