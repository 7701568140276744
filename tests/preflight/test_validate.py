"""`vaopd validate`: every mistake found at once, nothing written, no weight loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from small_pair import Pair
from vaopd.bench.gpu import real_config
from vaopd.cli import _shipped, app
from vaopd.config import RunConfig, load_config
from vaopd.errors import ConfigError
from vaopd.preflight.check import cost_text, validate
from vaopd.preflight.cost import Cost, Device, device_named, evaluation_seconds
from vaopd.preflight.memory import Model, Work, estimate, measure

CPU = Device("cpu", 2**34, None, None)
PAPER = Work(prompt=600, response=1024, patches=2000)  # a picture of 500 image tokens and a question


def test_a_good_recipe(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("vaopd.models.load.AutoModelForImageTextToText.from_pretrained", refuse)
    config, told = recipe(), []
    verdict = validate(config, CPU, on_progress=lambda name: lambda rows, share: told.append((name, rows, share)))
    assert verdict.problems == []
    assert not config.run.exists()
    assert told[-2:] == [("train", 6, 1.0), ("eval", 3, 1.0)] or told[-1] == ("eval", 3, 1.0)
    text = "\n".join(verdict.checks)
    for part in ("vocabulary ok", "6 train · 3 held out", "9 images decoded", "memory at most about", "a step is", "4 steps"):
        assert part in text


def test_one_mistake_does_not_hide_the_next(recipe: Callable[..., RunConfig], data: dict[str, str], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(data["train"]).read_text().splitlines()]
    bad = Path(data["train"]).with_name("bad.jsonl")
    bad.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"problem": 3}, {"problem": "x?", "images": ["gone.png"]}]))
    config = recipe(data={"train": str(bad)}, teacher=str(tmp_path / "nowhere"))
    models, found = validate(config, CPU).problems
    assert "there is no model folder" in models
    assert "data.train: 2 of 8 rows can't be used" in found
    assert "1 x field 'problem': must be text" in found
    assert "line 8" in found


def test_too_little_memory_is_a_problem(recipe: Callable[..., RunConfig]) -> None:
    (problem,) = validate(recipe(), Device("cpu", 2**20, None, None), with_data=False).problems
    assert "are needed at once, but cpu has 0.0" in problem


def test_the_command(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().to_yaml())
    done = CliRunner().invoke(app, ["validate", str(path)])
    assert done.exit_code == 0, done.output
    assert "nothing stands against this run" in done.output
    failed = CliRunner().invoke(app, ["validate", str(path), "--no-data", "--set", "student=./nowhere"])
    assert failed.exit_code == 1
    with pytest.raises(ConfigError, match="Did you mean 'RTX 4090'"):
        device_named("RTX 4080")


def test_pixel_limits_reach_the_processor(recipe: Callable[..., RunConfig], pair: Pair) -> None:
    def checks(**limits: int) -> list[str]:
        verdict = validate(recipe(data=limits), CPU, with_data=False)
        return verdict.checks + verdict.problems

    assert "an image is shown with 256 to 1,024 pixels" in checks(max_pixels=1024)
    assert "an image is shown with 2,048 to 4,096 pixels" in checks(min_pixels=2048)
    assert any("at least 8192 and at most 4096 pixels" in text for text in checks(min_pixels=8192))


def test_the_time_of_evaluations_by_hand() -> None:
    """Each round of 64 rows reads the weights once per token: 100 questions x 8 are 13 rounds, 601 x 8 are 76."""
    recipe = load_config(_shipped(Path("geometry3k")))
    student, teacher = student_of(False), measure(real_config("8B"))
    device = Device("card", 10**12, 1.0, 1e12)
    found = evaluation_seconds(recipe, student, teacher, device, steps=657, held_out=300, test=601)
    token = 4 * student.parameters / 0.6e12  # fp32 weights at 60 % of the bandwidth
    during = (1 + 14) * 13 * 1024 * token  # before the first step, every 50, and at the end
    final = 3 * 76 * 1024 * (2 * token + 2 * teacher.parameters / 0.6e12)  # seeing and twice blind: student, trained student, teacher
    assert found == pytest.approx(during + final, rel=1e-9)
    assert evaluation_seconds(recipe, student, teacher, CPU, steps=657, held_out=300, test=601) is None
    cost = Cost(10**12, 10**12, 9.0)
    assert "2.0 TFLOP" in cost_text(cost, 657, device, found)
    assert f"9 s, 1.6 h in all, and {found / 3600:.1f} h for evaluations (at 40 % of card's arithmetic" in cost_text(
        cost, 657, device, found
    )
    assert "evaluations apart" in cost_text(cost, 657, device)


# --- shipped recipes, from the published configurations ----------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers() -> dict[str, Model]:
    return {size: measure(real_config(size)) for size in ("4B", "8B", "32B")}


@lru_cache(maxsize=8)
def student_of(lora: bool) -> Model:
    """The 2B, whole or with adapters: what a recipe says beside that doesn't change what is trained."""
    return measure(real_config("2B"), load_config(_shipped(Path("geometry3k")), ["lora.rank=16"] if lora else []))


def test_sizes_are_the_published_ones(teachers: dict[str, Model]) -> None:
    """In billions, as the model cards' safetensors say."""
    assert [round(teachers[size].parameters / 1e9, 1) for size in ("4B", "8B", "32B")] == [4.4, 8.8, 33.4]


def test_what_costs_memory_costs_it_in_the_estimate(teachers: dict[str, Model]) -> None:
    """Each setting moves the peak as it must; weights, gradients and moments are known to the byte."""

    def peak(*settings: str, teacher: str = "8B") -> tuple[int, dict[str, dict[str, int]]]:
        recipe = load_config(_shipped(Path("geometry3k")), settings)
        found = estimate(recipe, student_of(recipe.lora is not None), teachers[teacher], PAPER, gpu=True, bf16=True)
        return found.peak, found.phases

    base, phases = peak()
    n = 2_127_532_032
    assert {name: phases["training"][name] for name in ("student", "optimiser", "gradients")} == {
        "student": 4 * n,
        "optimiser": 8 * n,
        "gradients": 4 * n,
    }
    assert phases["training"]["teacher"] == 2 * teachers["8B"].parameters
    assert peak("optim.checkpointing=false")[0] > base
    assert peak("teacher_offload=true")[0] < base
    assert peak("lora.rank=16")[0] < base / 1.5
    assert peak("rollouts.k=8")[1]["rollouts"]["keys and values"] == phases["rollouts"]["keys and values"]  # 64 rows side by side
    assert peak("rollouts.rows=32")[1]["rollouts"]["keys and values"] * 2 == phases["rollouts"]["keys and values"]
    assert "scoring" not in peak("method=sft")[1]
    assert "rollouts" not in peak("method=sft")[1]
