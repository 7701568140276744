"""The estimate of a run's peak against what a run really takes, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from small_pair import write_data
from vaopd.config import RunConfig, parse_config
from vaopd.data.render import Renderer
from vaopd.data.sources import read_examples
from vaopd.models.load import open_source, save_model
from vaopd.preflight.memory import Memory, Work, estimate, measure
from vaopd.types import ORIGINAL
from vaopd.world.draw import BOARD
from vaopd.world.phrases import texts
from vaopd.world.tiny import Size, build_model, build_processor

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A run that is measured: what it changes in the recipe, and in which phase its peak is expected."""

    name: str
    phase: str
    changes: dict[str, Any] = field(default_factory=dict)
    words: int = 0  # more entries of the vocabulary
    layers: int = 6


CASES = [
    # 12 and 21 million parameters; activations are the largest part.
    Case("plain", "training"),
    Case("checkpointing", "training", {"optim": {"checkpointing": True}}),
    Case("lora", "training", {"lora": {"rank": 16}}),
    Case("small micro-batches", "training", {"optim": {"tokens_per_forward": 400}}),
    Case("rows", "training", {"forward": "rows"}),
    Case("large vocabulary", "training", words=30_000, layers=2),
    Case(
        "many rollouts",
        "rollouts",
        {"rollouts": {"k": 16, "top_p": 0.9}, "optim": {"tokens_per_forward": 400, "steps": 1}, "lora": {"rank": 4}},
        8_000,
    ),
]


def recipe_of(case: Case, folder: Path) -> RunConfig:
    """Two models and data on disk, and the recipe of a run of two steps."""
    processor = build_processor(texts(), side=32, background=BOARD)
    processor.tokenizer.add_tokens([f"word{number}" for number in range(case.words)])
    for name, hidden, seed in (("student", 384, 1), ("teacher", 512, 2)):
        size = Size(vision_hidden=64, vision_layers=2, hidden=hidden, layers=case.layers)
        save_model(build_model(processor, size, side=32, seed=seed), processor, folder / name)
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"train": write_data(folder / "data", train=12)["train"]},
        "rollouts": {"k": 4, "max_tokens": 60, "temperature": 1.0, "top_p": 1.0},
        "optim": {"prompts_per_step": 6, "steps": 2},
        "precision": "fp32",
        "trackers": [],
    }
    for key, change in case.changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return parse_config(values)


def measured(recipe: RunConfig, folder: Path) -> float:
    """MiB above what a process with torch takes. Tensors have pages of their own, so that the holes of malloc's heap are not measured."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, str(HERE / "measured_run.py"), str(folder / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "PEAK" in done.stdout, done.stderr[-2000:]
    return float(done.stdout.partition("PEAK")[2].split()[0])


def estimated(recipe: RunConfig) -> Memory:
    """From the configurations alone."""
    student, teacher = measure(open_source(recipe.student).config, recipe), measure(open_source(str(recipe.teacher)).config)
    prompt = Renderer(open_source(recipe.student).processor)(read_examples(recipe.data.train)[0])
    work = Work(len(prompt.ids_P), recipe.rollouts.max_tokens, len(prompt.images[ORIGINAL]["pixel_values"]))
    return estimate(recipe, student, teacher, work, gpu=False, bf16=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_peak_of_a_run_on_a_cpu_within_20_percent(tmp_path: Path, case: Case) -> None:
    recipe = recipe_of(case, tmp_path)
    peak, memory = measured(recipe, tmp_path), estimated(recipe)
    print(f"{case.name}: measured {peak:.0f} MiB, estimated {memory.peak / 2**20:.0f} in {memory.phase}")
    assert memory.phase == case.phase
    assert peak * 0.8 < memory.peak / 2**20 < peak * 1.2
