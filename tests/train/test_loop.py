"""Whole runs on the small pair: what they write, and that a resumed run is the same run, to the bit."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from small_pair import Pair, make_config
from vaopd.config import RunConfig, load_config
from vaopd.data.sources import read_examples, write_examples
from vaopd.errors import CheckpointError, DataError, TrainingStopped
from vaopd.models.load import load_model, open_source
from vaopd.rollouts.given import GivenEngine
from vaopd.teachers.local import LocalTeacher
from vaopd.train import checkpoint, loop
from vaopd.train.evaluation import better
from vaopd.train.folder import RunFolder, read_rows
from vaopd.train.loop import Progress, train
from vaopd.train.schedule import learning_rate
from vaopd.train.setup import set_up, weighting_of
from vaopd.types import Example, Prompt, Scores

STEPS = 5
RUN = {"optim": {"lr": 1e-3, "prompts_per_step": 2, "steps": STEPS, "warmup": 0.25}, "checkpoint": {"every": 1}}

NUMBER, SHARE, COUNT = "number", "share", "count"
TRAIN_KEYS = {
    **dict.fromkeys(("loss", "kl", "va", "effective_rollouts", "lr", "grad_norm", "tokens", "seconds"), NUMBER),
    **dict.fromkeys(("va_top10", "truncated"), SHARE),
    **dict.fromkeys(("step", "empty", "skipped_prompts", "text_only", "nonfinite"), COUNT),
}
EVAL_KEYS = {
    **dict.fromkeys(("tokens", "va"), NUMBER),
    **dict.fromkeys(("accuracy", "se", "truncated"), SHARE),
    **dict.fromkeys(("step", "questions", "k"), COUNT),
}
MODEL_KEYS = {
    **dict.fromkeys(("va", "tokens"), NUMBER),
    **dict.fromkeys(("accuracy", "se", "blind_degraded", "blind_removed", "va_top10", "truncated"), SHARE),
}


def check_types(row: dict[str, Any], keys: dict[str, str]) -> None:
    for key, kind in keys.items():
        value = row[key]
        assert isinstance(value, int if kind == COUNT else int | float), f"{key}: {value!r}"
        assert not isinstance(value, bool), key
        assert math.isfinite(value), key
        assert 0 <= value <= (1 if kind == SHARE else math.inf), f"{key}: {value}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pair: Pair, data: dict[str, str]) -> Path:
    """One uninterrupted run with everything switched on."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = make_config(folder, pair, data, **RUN, trackers=["tensorboard"])
    assert train(config) == folder
    return folder


def outcome(run: Path, step: int = STEPS) -> dict[str, Any]:
    """Everything about a run that must not depend on how often it was interrupted."""
    last = run / "checkpoints" / f"step_{step:06d}"
    rows = read_rows(run / "metrics.jsonl")
    return {
        "metrics": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        **{file: (last / file).read_bytes() for file in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)},
        **{
            file: (run / file).read_bytes()
            for file in ("samples.jsonl", "eval.json", "model/model.safetensors", "checkpoints/best.json", "checkpoints/latest.json")
            if (run / file).exists()
        },
    }


def assert_same(one: Path, other: Path, step: int = STEPS) -> None:
    ours, theirs = outcome(one, step), outcome(other, step)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key] == theirs[key], key


# --- what a run writes (docs/run_folder.md) ---------------------------------------------------------------------------


def test_the_folder_has_what_is_documented(whole: Path) -> None:
    expected = {"config.yaml", "data.json", "metrics.jsonl", "samples.jsonl", "samples", "eval.json", "checkpoints", "model", "tensorboard"}
    assert {path.name for path in whole.iterdir()} == expected
    assert not list(whole.rglob("*unfinished*"))
    assert list((whole / "tensorboard").iterdir())


def test_the_written_recipe_is_the_recipe(whole: Path, pair: Pair, data: dict[str, str]) -> None:
    assert load_config(whole / "config.yaml") == make_config(whole, pair, data, **RUN, trackers=["tensorboard"])


def test_metrics(whole: Path) -> None:
    rows = read_rows(whole / "metrics.jsonl")
    kinds = [(row["kind"], row["step"]) for row in rows]
    training = [("train", step) for step in range(1, STEPS + 1)]
    assert kinds == [("eval", 0), *training[:2], ("eval", 2), *training[2:4], ("eval", 4), training[4], ("eval", 5)]
    for row in rows:
        check_types(row, TRAIN_KEYS if row["kind"] == "train" else EVAL_KEYS)
        if row["kind"] == "train":
            assert row["lr"] == learning_rate(load_config(whole / "config.yaml").optim, row["step"], STEPS)
            assert 1 <= row["effective_rollouts"] <= 3
            assert row["nonfinite"] == row["empty"] == row["skipped_prompts"] == 0
        else:
            assert (row["questions"], row["k"]) == (3, 2)


def test_the_loss_goes_down(whole: Path) -> None:
    losses = [row["loss"] for row in read_rows(whole / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_samples(whole: Path, data: dict[str, str]) -> None:
    rows = read_rows(whole / "samples.jsonl")
    asked = {example.id: example for example in read_examples(data["eval"])}
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4, 5, 5]
    for row in rows:
        example = asked[row["id"]]
        assert (row["problem"], row["answer"]) == (example.problem, example.answer)
        (pictures,) = row["images"]
        assert pictures["original"] != pictures["degraded"]
        assert Image.open(whole / pictures["original"]).size == Image.open(whole / pictures["degraded"]).size == (32, 32)
        assert len(row["rollouts"]) == 2
        assert sum(rollout["weight"] for rollout in row["rollouts"]) == pytest.approx(1, abs=1e-4)
        for rollout in row["rollouts"]:
            assert isinstance(rollout["text"], str)
            assert isinstance(rollout["correct"], bool)
            assert isinstance(rollout["ended"], bool)
            columns = ("va", "kl", "coefficient", "logp_teacher", "logp_degraded", "logp_student")
            assert {len(rollout[column]) for column in columns} == {len(rollout["tokens"])} != {0}
            assert rollout["ended"] == (len(rollout["tokens"]) < 6) or len(rollout["tokens"]) == 6
            assert sum(rollout["coefficient"]) == pytest.approx(rollout["weight"], abs=1e-4)
            for va, original, degraded in zip(rollout["va"], rollout["logp_teacher"], rollout["logp_degraded"], strict=True):
                assert va == pytest.approx(max(original - degraded, 0), abs=2e-4)
            assert max(rollout["logp_student"]) <= 0
            assert min(rollout["kl"]) >= -1e-5
    va = [x for row in rows for rollout in row["rollouts"] for x in rollout["va"]]
    assert max(va) > 0.1


def test_eval_json(whole: Path) -> None:
    report = json.loads((whole / "eval.json").read_text())
    assert (report["questions"], report["k"], report["gain"]) == (3, 2, None)
    assert set(report["models"]) == {"trained"}
    check_types(report["models"]["trained"], MODEL_KEYS)
    curve = report["mass_curve"]
    assert len(curve["tokens"]) == len(curve["mass"]) == 101
    assert (curve["tokens"][0], curve["mass"][0], curve["tokens"][-1]) == (0, 0, 1)
    assert curve["mass"][-1] == pytest.approx(1)


def test_the_baselines_are_evaluated_and_the_gain_is_paired(recipe: Callable[..., RunConfig], pair: Pair) -> None:
    config = recipe(optim={"steps": 1}, eval={"every": 5, "baselines": True})
    report = json.loads((train(config) / "eval.json").read_text())
    assert set(report["models"]) == {"student", "trained", "teacher"}
    for entry in report["models"].values():
        check_types(entry, MODEL_KEYS)
    before, after = (report["models"][name]["accuracy"] for name in ("student", "trained"))
    assert report["gain"]["points"] == pytest.approx(100 * (after - before))
    assert report["gain"]["low"] <= report["gain"]["points"] <= report["gain"]["high"]


def test_the_model_folder_has_the_best_weights(whole: Path) -> None:
    best = checkpoint.named(whole / "checkpoints", checkpoint.BEST)
    assert best is not None
    tensors = load_model(open_source(str(whole / "model")), dtype=torch.float32).state_dict()
    saved = load_file(best / checkpoint.MODEL)
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)


def test_retention_keeps_two_and_the_best(whole: Path) -> None:
    kept = [path.name for path in checkpoint.checkpoints(whole / "checkpoints")]
    best = checkpoint.named(whole / "checkpoints", checkpoint.BEST)
    assert best is not None
    assert kept[:2] == ["step_000005", "step_000004"]
    assert best.name in kept
    assert len(kept) <= 3


# --- resuming ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """A kill: no handler of ordinary errors sees it."""


def kill_at(kind: str, step: int) -> Progress:
    """Dies right after a row was written."""

    def on_row(row: dict[str, Any], steps: int) -> None:
        if (row["kind"], row["step"]) == (kind, step):
            raise Killed

    return Progress(on_row=on_row)


@pytest.mark.parametrize(("kind", "step"), [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 4), ("eval", 5)])
def test_a_resumed_run_is_the_same_run(recipe: Callable[..., RunConfig], whole: Path, kind: str, step: int) -> None:
    """Weights, optimiser, metrics, samples and the final evaluation, whenever the kill comes; ("eval", 0) is before any checkpoint."""
    config = recipe(**RUN)
    with pytest.raises(Killed):
        train(config, progress=kill_at(kind, step))
    assert_same(train(config, resume=True), whole)


def test_kills_before_the_first_step_and_in_the_final_evaluation(
    recipe: Callable[..., RunConfig], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(**RUN)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate", die)
        with pytest.raises(Killed):  # nothing of the run but its configuration
            train(config)
    with pytest.raises(Killed):
        train(config, resume=True, progress=Progress(on_final=die))
    assert not (config.run / "eval.json").exists()
    assert_same(train(config, resume=True), whole)
    # A run that is done can be resumed too: its end is done again.
    (config.run / "eval.json").unlink()
    assert_same(train(config, resume=True), whole)


def test_three_kills_and_one_torn_row(recipe: Callable[..., RunConfig], whole: Path) -> None:
    config = recipe(**RUN)
    for resume, kind, step in ((False, "eval", 0), (True, "train", 3), (True, "eval", 4)):
        with pytest.raises(Killed):
            train(config, resume=resume, progress=kill_at(kind, step))
        with (config.run / "metrics.jsonl").open("ab") as file:
            file.write('{"kind": "train", "step": 4, "text": "é'.encode()[:-1])
    assert_same(train(config, resume=True), whole)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[list[str]]]:
    """step -> the ids of the prompts it was given, each time that it was taken."""
    taken: dict[int, list[list[str]]] = {}
    step_of = loop.train_step

    def recording(prompts: list[Prompt], step: int, *arguments: Any) -> Any:
        taken.setdefault(step, []).append([prompt.id for prompt in prompts])
        return step_of(prompts, step, *arguments)

    monkeypatch.setattr(loop, "train_step", recording)
    return taken


def test_no_prompt_is_skipped_repeated_or_reordered_by_restarts(
    tmp_path: Path, pair: Pair, data: dict[str, str], ledger: dict[int, list[list[str]]]
) -> None:
    """Two epochs of 6 prompts in steps of 4: the third step ends the run; three kills."""
    options = {"data": {"train": data["train"]}, "optim": {"steps": None, "epochs": 1.5, "prompts_per_step": 4}, "checkpoint": {"every": 1}}
    train(make_config(tmp_path / "whole", pair, {}, **options))
    straight = {step: times[0] for step, times in ledger.items()}
    ledger.clear()
    config = make_config(tmp_path / "killed", pair, {}, **options)
    for resume, step in ((False, 1), (True, 2), (True, 3)):
        with pytest.raises(Killed):
            train(config, resume=resume, progress=kill_at("train", step))
    train(config, resume=True)
    assert set(ledger) == set(straight) == {1, 2, 3}
    for step, times in ledger.items():
        assert all(ids == straight[step] for ids in times), "a step that is taken again is given the same prompts in the same order"
    order = [id_ for step in (1, 2, 3) for id_ in straight[step]]
    assert len(straight[3]) == 1, "one and a half epochs of 6 are 9 prompts"
    assert sorted(order[:6]) == sorted(example.id for example in read_examples(data["train"]))
    assert len(set(order[6:])) == 3
    assert_same(tmp_path / "killed", tmp_path / "whole", step=3)


def watch(patch: pytest.MonkeyPatch, die_at: int | None) -> list[str]:
    """Count the file operations of checkpoints, and die at one of them."""
    done: list[str] = []

    def watched(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            if len(done) == die_at:
                raise Killed(name)
            return operation(*arguments, **options)

        return run

    for owner, names in (
        (checkpoint, ("save_file", "_write_json", "_sync")),
        (checkpoint.os, ("rename", "replace")),
        (checkpoint.shutil, ("rmtree",)),
    ):
        for name in names:
            patch.setattr(owner, name, watched(name, getattr(owner, name)))
    return done


def test_a_kill_at_every_file_operation_of_a_save(
    tmp_path: Path, pair: Pair, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sft, since it needs no teacher and so starts fast; three steps, a checkpoint after each, the best one moving along."""

    def make(run: Path) -> RunConfig:
        options: dict[str, Any] = {
            "method": "sft",
            "teacher": None,
            "optim": {"steps": 3},
            "checkpoint": {"every": 1},
            "eval": {"every": 1},
        }
        return make_config(run, pair, {"train": data["train"]}, **options)

    reference = train(make(tmp_path / "reference"))
    start = tmp_path / "start"
    with pytest.raises(Killed):
        train(make(start), progress=kill_at("train", 2))  # the checkpoints of steps 0 and 1 are there
    with monkeypatch.context() as patch:
        shutil.copytree(start, tmp_path / "count")
        total = watch(patch, None)
        with pytest.raises(Killed):
            train(make(tmp_path / "count"), resume=True, progress=kill_at("train", 3))
    assert "rename" in total
    assert "rmtree" in total
    for die_at in range(1, len(total) + 1):
        run = tmp_path / f"die_{die_at}"
        shutil.copytree(start, run)
        with monkeypatch.context() as patch:
            watch(patch, die_at)
            with pytest.raises(Killed):
                train(make(run), resume=True)
        train(make(run), resume=True)
        assert_same(run, reference, step=3)
        assert not list(run.rglob("*unfinished*")), f"{die_at}: {total[die_at - 1]}"
        shutil.rmtree(run)


def test_a_kill_between_the_last_save_and_its_pointer_does_not_cost_the_best_weights(
    recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, point = recipe(data={"eval": None}, optim={"steps": 2}, checkpoint={"every": 1}), checkpoint.point

    def die_at_the_last(folder: Path, pointer: str, name: str) -> None:
        if (pointer, name) == (checkpoint.BEST, "step_000002"):
            raise Killed
        point(folder, pointer, name)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "point", die_at_the_last)
        with pytest.raises(Killed):
            train(config)
    best = checkpoint.named(config.run / "checkpoints", checkpoint.BEST)
    assert best is not None
    assert best.name == "step_000000"
    train(config, resume=True)
    exported, last = load_file(config.run / "model" / "model.safetensors"), tensors(config.run, 2)
    assert all(torch.equal(exported[name], last[name]) for name in exported)


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST])
def test_a_damaged_checkpoint_costs_one_interval(
    recipe: Callable[..., RunConfig], whole: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(**RUN)
    shutil.copytree(whole, config.run)
    (config.run / "eval.json").unlink()
    newest = config.run / "checkpoints" / "step_000005" / file
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 4
    newest.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        train(config, resume=True)
    assert any("step_000005" in record.message and "falling back" in record.message for record in caplog.records)
    assert_same(config.run, whole)


def test_nothing_whole_is_no_fresh_start(recipe: Callable[..., RunConfig], whole: Path) -> None:
    config = recipe(**RUN)
    shutil.copytree(whole, config.run)
    before = (config.run / "metrics.jsonl").read_bytes()
    for path in checkpoint.checkpoints(config.run / "checkpoints"):
        (path / checkpoint.OPTIMIZER).unlink()
    with pytest.raises(CheckpointError, match="none of the"):
        train(config, resume=True)
    assert (config.run / "metrics.jsonl").read_bytes() == before, "nothing was rewound"


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(recipe: Callable[..., RunConfig], whole: Path) -> None:
    config = recipe(**RUN)
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(config, resume=True)
    assert not config.run.exists()
    shutil.copytree(whole, config.run)
    before = {path: path.read_bytes() for path in config.run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="there is a run in"):
        train(config)
    assert {path: path.read_bytes() for path in config.run.rglob("*") if path.is_file()} == before


def test_another_students_checkpoint_is_refused(recipe: Callable[..., RunConfig], pair: Pair, whole: Path) -> None:
    config = recipe(**RUN, student=str(pair.teacher_folder))
    shutil.copytree(whole, config.run)
    with pytest.raises(CheckpointError, match="student was"):
        train(config, resume=True)
    # The same name may have come to hold another model.
    (config.run / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(CheckpointError, match="another model"):
        train(config, resume=True)


# --- steps that are not finite ----------------------------------------------------------------------------------------


def sick_at(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """The teacher's states are not numbers at these steps."""
    score, step_of = LocalTeacher.score, loop.train_step
    now = [0]

    def stepping(prompts: Any, step: int, *arguments: Any) -> Any:
        now[0] = step
        try:
            return step_of(prompts, step, *arguments)
        finally:
            now[0] = 0

    def spoiled(self: LocalTeacher, *arguments: Any) -> list[Scores]:
        scores = score(self, *arguments)
        if now[0] in steps:
            scores[0].hidden_NG[0, 0] = math.nan
        return scores

    patch.setattr(loop, "train_step", stepping)
    patch.setattr(LocalTeacher, "score", spoiled)


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step_{step:06d}"
    return {**load_file(folder / checkpoint.MODEL), **load_file(folder / checkpoint.OPTIMIZER)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_two_bad_steps_change_nothing_and_do_not_stop_the_run(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    sick_at(monkeypatch, 2, 3, 5)
    run = train(recipe(**{**RUN, "checkpoint": {"every": 1, "keep": 9}}))
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["nonfinite"] for row in rows] == [0, 1, 1, 0, 1]
    assert rows[1]["loss"] is None
    assert equal(tensors(run, 1), tensors(run, 2))
    assert equal(tensors(run, 1), tensors(run, 3))
    assert not equal(tensors(run, 3), tensors(run, 4))
    states = [json.loads((run / "checkpoints" / f"step_{step:06d}" / checkpoint.STATE).read_text()) for step in (2, 3, 4, 5)]
    assert [state["nonfinite_streak"] for state in states] == [1, 2, 0, 1]


def test_three_bad_steps_in_a_row_stop_the_run(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    sick_at(monkeypatch, 1, 2, 3)
    config = recipe(**RUN)
    with pytest.raises(TrainingStopped, match="up to step 3"):
        train(config)
    assert equal(tensors(config.run, 0), tensors(config.run, 2))
    assert [row["step"] for row in read_rows(config.run / "metrics.jsonl") if row["kind"] == "train"] == [1, 2, 3]


def test_the_streak_survives_a_kill(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that is restarted again and again would never stop itself."""
    sick_at(monkeypatch, 2, 3, 4)
    config = recipe(**RUN)
    with pytest.raises(Killed):
        train(config, progress=kill_at("train", 4))
    with pytest.raises(TrainingStopped, match="up to step 4"):
        train(config, resume=True)


# --- methods and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "opd",
        {"va_opd": {"tau": 0.5}},
        "rollout_only",
        "token_only",
        "random_tokens",
        {"mask_tokens": {"which": "lowest"}},
        "off_policy_kd",
        "sft",
    ],
    ids=str,
)
def test_every_method_runs(recipe: Callable[..., RunConfig], data: dict[str, str], method: Any) -> None:
    config = recipe(method=method, data={"eval": None}, optim={"steps": 2}, rollouts={"max_tokens": 6 if "off" not in str(method) else 99})
    rows = [row for row in read_rows(train(config) / "metrics.jsonl") if row["kind"] == "train"]
    name = config.method.name
    for row in rows:
        assert row["loss"] > 0
        assert (row["kl"] is None) == (name == "sft")
        assert (row["va"] is None) == (name in ("opd", "off_policy_kd", "sft"))
        assert row["effective_rollouts"] == pytest.approx({"off_policy_kd": 1, "sft": 1}.get(name, 3)) or name in (
            "va_opd",
            "rollout_only",
            "random_tokens",
        )


@pytest.mark.parametrize("method", ["sft", "off_policy_kd"])
def test_off_policy_methods_learn_from_the_datas_solutions(
    recipe: Callable[..., RunConfig], pair: Pair, data: dict[str, str], method: str
) -> None:
    config = recipe(method=method, rollouts={"max_tokens": 99, "k": 4})
    run = set_up(config, on_check=lambda text: None)
    engine, examples = run.tools.engine, read_examples(data["train"])
    assert isinstance(engine, GivenEngine)
    groups = engine.generate([run.renderer(example) for example in examples], run.tools.k, 1)
    tokenizer = pair.source.processor.tokenizer
    for group, example in zip(groups, examples, strict=True):
        (response,) = group.responses
        assert tokenizer.decode(response[:-1]) == example.solution
        assert int(response[-1]) == tokenizer.eos_token_id
    assert run.tools.k == 1
    assert run.config.loss == {"sft": "nll", "off_policy_kd": "forward_kl"}[method]


def test_sft_learns_the_solutions(recipe: Callable[..., RunConfig]) -> None:
    config = recipe(
        method="sft",
        teacher=None,
        data={"eval": None},
        rollouts={"max_tokens": 99},
        optim={"steps": 12, "prompts_per_step": 6, "lr": 3e-3, "schedule": "constant"},
    )
    losses = [row["loss"] for row in read_rows(train(config) / "metrics.jsonl")]
    assert losses[0] > 5
    assert losses[-1] < losses[0] - 2


def test_off_policy_methods_need_solutions(recipe: Callable[..., RunConfig], tmp_path: Path, data: dict[str, str]) -> None:
    rows = [Example(e.id, e.images, e.problem, e.answer) for e in read_examples(data["train"])]
    path = write_examples(rows, tmp_path / "without", "train")
    with pytest.raises(DataError, match="6 of 6 rows"):
        train(recipe(method="sft", data={"train": str(path)}))


def test_a_frozen_vision_tower_does_not_move(recipe: Callable[..., RunConfig], pair: Pair) -> None:
    config = recipe(data={"eval": None}, optim={"steps": 2, "lr": 0.01, "train_vision": False})
    trained = load_file(train(config) / "model" / "model.safetensors")
    before = load_file(pair.student_folder / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert moved == {name for name in before if "visual" not in name}
    assert not any("visual" in name for name in load_file(config.run / "checkpoints" / "step_000002" / checkpoint.OPTIMIZER))


def test_data_without_answers_is_trained_on_and_the_best_is_by_divergence(
    recipe: Callable[..., RunConfig], tmp_path: Path, data: dict[str, str]
) -> None:
    rows = [Example(e.id, e.images, e.problem) for e in read_examples(data["eval"])]
    path = write_examples(rows, tmp_path / "without", "eval")
    run = train(recipe(data={"eval": str(path)}))
    evaluations = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "eval"]
    assert all(row["accuracy"] is None and row["se"] is None for row in evaluations)
    best = checkpoint.named(run / "checkpoints", checkpoint.BEST)
    assert best is not None
    assert int(best.name[-6:]) == min(evaluations, key=lambda row: row["kl"])["step"]
    assert all(r["correct"] is None for row in read_rows(run / "samples.jsonl") for r in row["rollouts"])
    entry = json.loads((run / "eval.json").read_text())["models"]["trained"]
    assert entry["accuracy"] is entry["se"] is entry["blind_degraded"] is entry["blind_removed"] is None
    assert entry["va"] > 0


def test_without_held_out_data_the_last_is_the_best(recipe: Callable[..., RunConfig]) -> None:
    run = train(recipe(data={"eval": None}))
    best = checkpoint.named(run / "checkpoints", checkpoint.BEST)
    assert best is not None
    assert best.name == "step_000004"
    assert not (run / "eval.json").exists()
    assert (run / "model" / "model.safetensors").exists()


def test_the_better_evaluation() -> None:
    def row(accuracy: float | None, kl: float | None = None) -> dict[str, Any]:
        return {"accuracy": accuracy, "kl": kl}

    assert better(row(0.6, 9.0), row(0.5, 1.0))
    assert not better(row(0.5, 1.0), row(0.6, 9.0))
    assert better(row(0.0, 1.0), row(0.0, 9.0)), "equal: the nearer to the teacher, also before the first right answer"
    assert not better(row(0.5, 1.0), row(0.5, 1.0)), "nothing tells them apart: the earlier"
    assert better(row(None, 0.9), row(None, 1.0))
    assert not better(row(None, 1.1), row(None, 1.0))
    assert better(row(None), row(None)), "nothing to choose by: the later"


def test_a_random_weighting_draws_anew_at_every_step(recipe: Callable[..., RunConfig]) -> None:
    config = recipe(method={"random_tokens": {"seed": 2}})
    seeds = {weighting_of(config.method, step).seed for step in range(50)}  # type: ignore[attr-defined]
    other = recipe(method={"random_tokens": {"seed": 3}})
    assert len(seeds) == 50
    assert seeds.isdisjoint(weighting_of(other.method, step).seed for step in range(50))  # type: ignore[attr-defined]


def test_a_step_is_given_its_own_weighting(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int, Any] = {}
    step_of = loop.train_step

    def recording(prompts: Any, step: int, weighting: Any, tools: Any) -> Any:
        given[step] = weighting
        return step_of(prompts, step, weighting, tools)

    monkeypatch.setattr(loop, "train_step", recording)
    config = recipe(method="random_tokens", data={"eval": None}, optim={"steps": 3})
    train(config)
    assert given == {step: weighting_of(config.method, step) for step in (1, 2, 3)}


def test_a_question_that_is_trained_on_can_not_be_held_out(recipe: Callable[..., RunConfig], data: dict[str, str]) -> None:
    with pytest.raises(DataError):
        train(recipe(data={"eval": data["train"]}))


def test_two_processes_do_not_write_to_one_folder(recipe: Callable[..., RunConfig]) -> None:
    config = recipe()
    with RunFolder(config.run).claimed(), pytest.raises(CheckpointError, match="another process is writing"):
        train(config)
    train(config)
