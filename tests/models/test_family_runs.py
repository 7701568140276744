"""A whole run of families other than the built-in one: nothing on the way from folder to folder is of Qwen3-VL alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from small_families import make_small
from small_pair import make_config
from vaopd.models.load import load_model, open_source, save_model
from vaopd.train.loop import train

RUNS = [  # student, teacher, whether the vision tower is trained
    ("gemma3", "gemma3", True),
    ("smolvlm", "smolvlm", True),
    ("llava_onevision", "llava_onevision", False),
    ("qwen3_vl", "qwen3_vl_moe", True),
]


@pytest.mark.parametrize(("student", "teacher", "train_vision"), RUNS)
def test_a_run_goes_from_folders_to_a_folder(tmp_path: Path, data: dict[str, str], student: str, teacher: str, train_vision: bool) -> None:
    """Student and teacher differ in width and padding as well."""
    for role, name, shape in (("student", student, {"pad": 7}), ("teacher", teacher, {"pad": 20, "hidden": 96, "seed": 2})):
        it = make_small(name, **shape)
        save_model(it.model, it.processor, tmp_path / role)
    pair: Any = SimpleNamespace(student_folder=tmp_path / "student", teacher_folder=tmp_path / "teacher")
    train(make_config(tmp_path / "run", pair, {"train": data["train"]}, view="black", optim={"steps": 2, "train_vision": train_vision}))

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["nonfinite"] == 0 for line in steps)
    assert all(line["va"] > 0 for line in steps), "the teacher sees the image"
    before, after = (load_model(open_source(str(folder)), dtype=torch.float32) for folder in (tmp_path / "student", tmp_path / "run/model"))
    moved, still = (
        {key for (key, x), y in zip(before.named_parameters(), after.parameters(), strict=True) if torch.equal(x, y) == same}
        for same in (False, True)
    )
    assert any("layers.1.self_attn" in key for key in moved)
    patches = {key for key in moved | still if "patch_embed" in key}
    assert patches
    assert patches <= (moved if train_vision else still)
