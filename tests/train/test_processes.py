"""One run by two processes: the same gradients, losses and weights as by one, written by one of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from small_pair import Pair, make_config, write_data
from vaopd.data.sources import read_examples, write_examples
from vaopd.train import checkpoint
from vaopd.train.folder import read_rows

STEPS = 4
# Three prompts a step: one process has two of them, the other one, which may have no picture.
CHANGES: dict[str, Any] = {
    "optim": {"lr": 1e-3, "prompts_per_step": 3, "steps": STEPS, "warmup": 0.25},
    "eval": {"every": 2},
    "checkpoint": {"every": 1, "keep": 5},
}


def launch(config: Any, *options: str, processes: int) -> None:
    """`vaopd train` as it is launched for several processes, which talk through gloo on a CPU."""
    recipe = config.run.parent / f"{config.run.name}.yaml"
    recipe.write_text(config.to_yaml())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "vaopd", "train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *command, "--no-report", *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every second question of the training set has no picture."""
    paths = write_data(tmp_path_factory.mktemp("data"))
    rows = [dataclasses.replace(e, images=e.images if i % 2 else ()) for i, e in enumerate(read_examples(paths["train"]))]
    return {**paths, "train": str(write_examples(rows, tmp_path_factory.mktemp("mixed"), "train"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pair: Pair, data: dict[str, str]) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        launch(make_config(folder / str(processes), pair, data, **CHANGES), processes=processes)
    return {processes: folder / str(processes) for processes in (1, 2)}


def training(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]


def test_losses_and_gradients_are_those_of_one_process(runs: dict[int, Path]) -> None:
    for key in ("loss", "grad_norm"):
        one, two = ([row[key] for row in training(runs[processes])] for processes in (1, 2))
        assert two == pytest.approx(one, rel=1e-4), key
    assert len(training(runs[2])) == STEPS, "a row a step, from one of them"


def test_the_weights_are_those_of_one_process(runs: dict[int, Path]) -> None:
    """To a thousandth of the way that they have gone: Adam makes steps of full size of gradients that are only rounding."""

    def weights(processes: int, step: int) -> Tensor:
        found = load_file(runs[processes] / f"checkpoints/step_{step:06d}" / checkpoint.MODEL)
        return torch.cat([found[name].flatten() for name in sorted(found)])

    before, one, two = weights(1, 0), weights(1, STEPS), weights(2, STEPS)
    assert torch.equal(weights(2, 0), before)
    assert float((one - two).norm()) < 1e-3 * float((one - before).norm())


def test_one_of_them_writes_what_one_process_writes(runs: dict[int, Path]) -> None:
    one, two = ({str(p.relative_to(runs[n])) for p in runs[n].rglob("*") if p.is_file()} for n in (1, 2))
    assert two == one
    assert (runs[2] / "samples.jsonl").read_text().count("\n") == (runs[1] / "samples.jsonl").read_text().count("\n")


def test_a_run_by_two_resumes_to_the_bit(runs: dict[int, Path], tmp_path: Path, pair: Pair, data: dict[str, str]) -> None:
    """Both go on from the checkpoint that one of them wrote."""
    again, last = tmp_path / "2", f"checkpoints/step_{STEPS:06d}"
    shutil.copytree(runs[2], again)
    shutil.rmtree(again / last)
    launch(make_config(again, pair, data, **CHANGES), "--resume", processes=2)
    assert (again / last / checkpoint.MODEL).read_bytes() == (runs[2] / last / checkpoint.MODEL).read_bytes()
    assert [row["loss"] for row in training(again)] == [row["loss"] for row in training(runs[2])]
