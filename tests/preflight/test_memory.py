"""The estimate of a run's peak against what a run really takes, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_pair import write_data
from vaopd.config import parse_config
from vaopd.models.load import open_source, save_model
from vaopd.preflight.memory import Work, estimate, measure
from vaopd.world.draw import BOARD
from vaopd.world.phrases import texts
from vaopd.world.tiny import Size, build_model, build_processor

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_peak_of_a_run_on_a_cpu_within_20_percent(tmp_path: Path) -> None:
    """12 and 21 million parameters: 850 MiB above the interpreter's baseline, of which activations are more than half."""
    processor = build_processor(texts(), side=32, background=BOARD)
    for name, hidden, seed in (("student", 384, 1), ("teacher", 512, 2)):
        size = Size(vision_hidden=64, vision_layers=2, hidden=hidden, layers=6)
        save_model(build_model(processor, size, side=32, seed=seed), processor, tmp_path / name)
    recipe = parse_config(
        {
            "run": str(tmp_path / "run"),
            "student": str(tmp_path / "student"),
            "teacher": str(tmp_path / "teacher"),
            "data": {"train": write_data(tmp_path / "data", train=12)["train"]},
            "rollouts": {"k": 4, "max_tokens": 60, "temperature": 1.0, "top_p": 1.0},
            "optim": {"prompts_per_step": 6, "steps": 2},
            "precision": "fp32",
            "trackers": [],
        }
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, str(HERE / "measured_run.py"), str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert "PEAK" in done.stdout, done.stderr[-2000:]
    measured = float(done.stdout.partition("PEAK")[2].split()[0])
    student, teacher = measure(open_source(recipe.student).config, recipe), measure(open_source(str(recipe.teacher)).config)
    memory = estimate(recipe, student, teacher, Work(prompt=40, response=60, patches=64), gpu=False, bf16=False)
    assert memory.phase == "training"
    assert measured * 0.8 < memory.peak / 2**20 < measured * 1.2
