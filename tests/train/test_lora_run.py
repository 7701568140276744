"""Whole runs with adapters: what they write and resume, and the student as its own teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file, save_file

from small_pair import Pair, make_config
from vaopd.config import RunConfig, ViewConfig, parse_config
from vaopd.errors import CheckpointError, ConfigError
from vaopd.evaluate.command import evaluate_folder
from vaopd.models.load import load_model, open_source
from vaopd.models.lora import adapters
from vaopd.train import checkpoint, loop
from vaopd.train import setup as set_up_module
from vaopd.train.evaluation import FINAL_NOISE
from vaopd.train.folder import read_rows
from vaopd.train.loop import Progress, train
from vaopd.train.prompts import PromptsAhead
from vaopd.train.setup import Run, set_up

LORA = {
    "lora": {"rank": 4, "alpha": 8},
    "optim": {"lr": 3e-2, "prompts_per_step": 2, "steps": 3, "warmup": 0.25},
    "checkpoint": {"every": 1},
}


def prepare(config: RunConfig) -> Run:
    return set_up(config, on_check=lambda text: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pair: Pair, data: dict[str, str]) -> Path:
    folder = train(make_config(tmp_path_factory.mktemp("lora") / "run", pair, data, **LORA))
    assert best_of(folder).name != "step_000000", "the best weights must be trained ones here"
    return folder


def best_of(run: Path) -> Path:
    best = checkpoint.named(run / "checkpoints", checkpoint.BEST)
    assert best is not None
    return best


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_section_and_its_defaults(recipe: Callable[..., RunConfig]) -> None:
    assert recipe().lora is None
    config = recipe(lora={})
    assert config.lora is not None
    assert config.lora.model_dump() == {"rank": 16, "alpha": 32, "dropout": 0, "targets": None, "vision": False}
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"dropout": 0.05}}, "lora.dropout.*must be 0, found 0.05.*Leave it out"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"targets": []}}, "lora.targets"),
        ({"lora": {"ranks": 8}}, "Did you mean 'rank'"),
        ({"lora": {"vision": True}, "optim": {"train_vision": False}}, "Keep one of them"),
        ({"teacher": "student"}, "only where adapters are trained.*add `lora: {}`.*load it twice with `teacher: /"),
    ],
)
def test_a_wrong_section_is_refused(recipe: Callable[..., RunConfig], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_only_the_adapters_are_optimised(recipe: Callable[..., RunConfig]) -> None:
    run = prepare(recipe(**LORA))
    (group,) = run.tools.optimizer.param_groups
    trained = {id(p) for name, p in run.student.named_parameters() if ".lora_" in name}
    assert {id(p) for p in group["params"]} == trained
    assert len(trained) == 2 * 14
    assert run.tools.engine.model is run.student  # type: ignore[attr-defined]
    other = prepare(recipe(**LORA, seed=1))
    start, another = (next(iter(adapters(r.student).values())).lora_A["default"].weight for r in (run, other))
    assert not torch.equal(start, another), "the run's seed draws them"


@pytest.mark.parametrize("train_vision", [True, False])
def test_the_loss_goes_down(recipe: Callable[..., RunConfig], train_vision: bool) -> None:
    changes = {**LORA, "optim": {**LORA["optim"], "steps": 6, "train_vision": train_vision}}
    folder = train(recipe(**changes, eval={"every": 10}, forward="auto" if train_vision else "rows"))
    losses = [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.95 * losses[0]


def test_a_checkpoint_has_the_adapters_alone(whole: Path) -> None:
    for path in checkpoint.checkpoints(whole / "checkpoints"):
        saved = load_file(path / checkpoint.MODEL)
        assert len(saved) == 2 * 14
        assert all(".lora_" in name for name in saved)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        slots = {name.rpartition("/")[0] for name in load_file(path / checkpoint.OPTIMIZER)}
        assert slots <= saved.keys()


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_is_the_same_run_to_the_bit(recipe: Callable[..., RunConfig], whole: Path, step: int) -> None:
    class Killed(BaseException):
        pass

    def kill(row: dict[str, Any], steps: int) -> None:
        if (row["kind"], row["step"]) == ("train", step):
            raise Killed

    config = recipe(**LORA)
    with pytest.raises(Killed):
        train(config, progress=Progress(on_row=kill))
    torch.manual_seed(99)  # what the adapters start from must not come from here
    folder = train(config, resume=True)
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE):
        assert (folder / "checkpoints/step_000003" / file).read_bytes() == (whole / "checkpoints/step_000003" / file).read_bytes(), file
    for file in ("samples.jsonl", "eval.json", "model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_base_that_was_changed_in_between_is_refused(recipe: Callable[..., RunConfig], pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.student_folder, tmp_path / "base")
    config = recipe(**LORA, student=str(tmp_path / "base"))
    train(config)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "visual" in name)
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="beside other frozen weights"):
        train(config, resume=True)


def test_the_folder_is_merged_and_the_adapter_is_kept(whole: Path, pair: Pair) -> None:
    """Base and adapter through PEFT, and the merged folder without it, hold the same weights, and they are the best checkpoint's."""
    plain = load_model(open_source(str(whole / "model")), dtype=torch.float32)
    through_peft = PeftModel.from_pretrained(pair.fresh(), whole / "adapter").merge_and_unload()
    ours, theirs, base = plain.state_dict(), through_peft.state_dict(), pair.student.state_dict()
    assert ours.keys() == theirs.keys() == base.keys()
    changed = [name for name in ours if not torch.equal(ours[name], base[name])]
    assert len(changed) == 14
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-6 for name in ours)
    best = load_file(best_of(whole) / checkpoint.MODEL)
    kept = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[f"base_model.model.{name.replace('.default.', '.')}"], tensor) for name, tensor in best.items())
    assert json.loads((whole / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(pair.student_folder)
    assert "adapters of rank 4, alpha 8" in (whole / "model" / "README.md").read_text(encoding="utf-8")


def test_the_merged_folder_answers_as_the_run_measured(whole: Path, data: dict[str, str]) -> None:
    """`vaopd evaluate` of the folder gives the accuracy of eval.json: the adapted and the merged model sample the same."""
    measured = json.loads((whole / "eval.json").read_text())["models"]["trained"]
    entry = evaluate_folder(
        str(whole / "model"),
        Path(data["eval"]),
        k=2,
        teacher=None,
        max_tokens=6,
        temperature=1.0,
        rows=64,
        view_config=ViewConfig(),
        seed=FINAL_NOISE,
        on_progress=lambda done, of: None,
    )
    assert entry["per_question"] == measured["per_question"]
    assert entry["tokens"] == pytest.approx(measured["tokens"])


# --- the student as its own teacher -----------------------------------------------------------------------------------


def self_taught(**changes: Any) -> dict[str, Any]:
    return {**LORA, "teacher": "student", "method": "sft", **changes}


def test_the_model_is_loaded_once(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    monkeypatch.setattr(set_up_module, "load_model", lambda *args, **options: loads.append(load_model(*args, **options)) or loads[-1])
    run = prepare(recipe(**self_taught()))
    assert run.teacher is not None
    assert run.teacher.model is run.student is loads[0]
    assert len(loads) == 1


def test_it_measures_how_far_the_student_goes(recipe: Callable[..., RunConfig]) -> None:
    folder = train(recipe(**self_taught(eval={"every": 1})))
    evaluations = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval"]
    assert abs(evaluations[0]["kl"]) < 1e-6
    assert evaluations[-1]["kl"] > 1e-3
    assert all(row["va"] > 0 for row in evaluations)


def test_the_final_evaluation_switches_the_adapters_off_for_the_untrained_student(
    recipe: Callable[..., RunConfig], tmp_path: Path, data: dict[str, str]
) -> None:
    changes = self_taught(data={"eval": None, "test": data["eval"]}, eval={"baselines": True})  # without eval the last step is the best
    models = json.loads((train(recipe(**changes)) / "eval.json").read_text())["models"]
    plain = json.loads((train(recipe(**changes | {"lora": None, "teacher": None, "run": str(tmp_path / "b")})) / "eval.json").read_text())
    assert set(models) == {"student", "trained"}, "the teacher is the student's entry"
    measured = ("accuracy", "blind_degraded", "blind_removed", "tokens", "per_question")
    assert [models["student"][key] for key in measured] == [plain["models"]["student"][key] for key in measured]
    assert models["student"]["va"] != models["trained"]["va"], "they answer otherwise"


def test_training_leaves_the_base_untouched(recipe: Callable[..., RunConfig], pair: Pair) -> None:
    run = prepare(recipe(**self_taught()))
    base = {name: tensor.clone() for name, tensor in pair.student.state_dict().items()}
    start = {name: layer.lora_B["default"].weight.clone() for name, layer in adapters(run.student).items()}
    assert run.teacher is not None
    prompts = [run.renderer(example) for example in run.train[:2]]
    groups = run.tools.engine.generate(prompts, 1, 1)
    before = run.teacher.score(groups, ("original",))
    ahead = PromptsAhead(run, ThreadPoolExecutor(1))
    for step in (1, 2):
        loop._one_step(run, step, ahead)
    after = run.teacher.score(groups, ("original",))
    state = run.student.state_dict()
    assert all(torch.equal(state.get(name, state.get(name.replace(".weight", ".base_layer.weight"))), base[name]) for name in base)
    assert all(torch.equal(a.hidden_NG, b.hidden_NG) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(layer.lora_B["default"].weight, start[name]) for name, layer in adapters(run.student).items())


def test_a_teacher_with_nothing_to_teach_is_said(recipe: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture) -> None:
    prepare(recipe(**self_taught()))
    assert "nothing to learn" not in caplog.text
    run = prepare(recipe(**self_taught(method="opd")))
    assert "`opd` has nothing to learn from it" in caplog.text
    assert abs(loop._one_step(run, 1, PromptsAhead(run, ThreadPoolExecutor(1)))["loss"]) < 1e-6


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Accelerate fixes one precision for a process; this forgets it before and after a test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("teacher", ["student", None])
def test_in_bf16_the_frozen_weights_are_bf16_and_the_adapters_fp32(
    recipe: Callable[..., RunConfig], pair: Pair, teacher: str | None
) -> None:
    changes = {**LORA, "method": "sft" if teacher else "va_opd", "teacher": teacher or str(pair.teacher_folder)}
    run = prepare(recipe(**changes, precision="bf16"))
    dtypes = {trained: {p.dtype for p in run.student.parameters() if p.requires_grad is trained} for trained in (True, False)}
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    row = loop._one_step(run, 1, PromptsAhead(run, ThreadPoolExecutor(1)))
    assert row["nonfinite"] == 0
    assert row["grad_norm"] > 0
    assert {p.dtype for p in run.student.parameters() if p.requires_grad} == {torch.float32}
