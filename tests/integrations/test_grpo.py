"""GRPO through TRL on a recipe: what it trains on, how it is rewarded, and what it leaves. Needs TRL: `make test-peers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from small_pair import Pair
from vaopd.config import parse_config
from vaopd.data.sources import read_examples
from vaopd.errors import ConfigError, DataError
from vaopd.models.load import load_model, open_source

pytest.importorskip("trl")
pytest.importorskip("datasets")

from trl import GRPOTrainer

from vaopd.integrations.grpo import arguments, main, right, train_grpo

K, PROMPTS = 3, 2


@pytest.fixture
def recipe(pair: Pair, data: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        "run": str(tmp_path / "run"),
        "method": "opd",
        "student": str(pair.student_folder),
        "teacher": str(pair.teacher_folder),
        "data": data,
        "rollouts": {"k": K, "max_tokens": 6, "temperature": 1.0, "top_p": 1.0},
        "optim": {"lr": 0.01, "prompts_per_step": PROMPTS, "steps": 2, "warmup": 0.0},
        "eval": {"every": 1, "k": 2},
    }


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def test_a_right_final_answer_is_rewarded() -> None:
    said = ["It is 3 + 4 = 7. The answer is 7.", "The answer is 8.", "No idea"]
    assert right([[{"role": "assistant", "content": text}] for text in said], answer=["7", "7", "7"], other=[1, 2, 3]) == [1.0, 0.0, 0.0]


def test_the_recipe_s_numbers_are_trl_s(recipe: dict[str, Any]) -> None:
    config = parse_config({**recipe, "seed": 5}, where="recipe")
    found = arguments(config, 7)
    assert (found.num_generations, found.per_device_train_batch_size, found.generation_batch_size) == (K, K * PROMPTS, K * PROMPTS)
    assert (found.max_steps, found.learning_rate, found.max_completion_length, found.seed) == (7, 0.01, 6, 5)
    assert (found.adam_beta1, found.adam_beta2, found.max_grad_norm) == (*config.optim.betas, config.optim.clip)
    assert (found.temperature, found.top_p, found.beta, found.num_iterations) == (1.0, 1.0, 0.0, 1)


def test_a_run_is_rewarded_by_the_answers_and_keeps_the_best_weights(
    recipe: dict[str, Any], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are swapped for what is likely, so that the group has right and wrong ones and the weights move."""
    monkeypatch.setattr("vaopd.integrations.grpo.is_correct", lambda text, answer: len(text) % 2 == 0)
    folder = train_grpo(parse_config(recipe, where="recipe"), say=lambda text: None)
    trained, evaluations = rows(folder, "train"), rows(folder, "eval")
    assert [row["step"] for row in trained] == [1, 2]
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    assert all(0 <= row["reward"] <= 1 for row in trained)
    assert any(row["grad_norm"] > 0 for row in trained)
    assert set(json.loads((folder / "eval.json").read_text())["models"]) == {"trained", "student", "teacher"}
    before, after = (load_file(path / "model.safetensors") for path in (pair.student_folder, folder / "model"))
    moved = any(not torch.equal(before[name].float(), after[name].float()) for name in after if name in before)
    best = max(evaluations, key=lambda row: (row["accuracy"], -row["kl"], -row["step"]))
    assert moved == (best["step"] > 0)


def test_the_weights_of_the_best_evaluation_are_kept(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three: as many right answers as the first, and nearer to the teacher."""
    found = {0: {"accuracy": 0.5, "kl": 0.9}, 1: {"accuracy": 0.5, "kl": 0.4}, 2: {"accuracy": 0.3, "kl": 0.1}}
    seen = {}

    def scripted(run: Any, step: int) -> Any:
        seen[step] = {name: p.detach().clone() for name, p in run.student.named_parameters()}
        return {"kind": "eval", "step": step, **found[step]}, []

    monkeypatch.setattr("vaopd.integrations.grpo.evaluate_step", scripted)
    monkeypatch.setattr("vaopd.integrations.grpo.is_correct", lambda text, answer: len(text) % 2 == 0)
    config = parse_config({**recipe, "optim": {**recipe["optim"], "schedule": "constant"}}, where="recipe")
    kept = load_model(open_source(str(train_grpo(config, say=lambda text: None) / "model")), dtype=torch.float32)

    def distance(step: int) -> float:
        return max(float((p.detach() - seen[step][name]).abs().max()) for name, p in kept.named_parameters())

    assert distance(1) == min(distance(step) for step in seen)
    assert min(distance(0), distance(2)) > 10 * distance(1)


def test_trl_asks_what_the_package_asks(recipe: dict[str, Any], pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same token ids as the package's own renderer, K times each, a picture in the middle of its question among them."""
    asked: list[tuple[int, ...]] = []
    sample = GRPOTrainer._generate_single_turn

    def listening(self: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        asked.extend(map(tuple, prompt_ids))
        return sample(self, prompt_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", listening)
    train = Path(recipe["data"]["train"])
    found = [json.loads(line) for line in train.read_text().splitlines()][:PROMPTS]
    found[0]["problem"] = "Look at <image> and say: how long is the longest side?"
    marked = train.with_name("marked.jsonl")
    marked.write_text("".join(json.dumps(row) + "\n" for row in found))
    config = parse_config({**recipe, "data": {**recipe["data"], "train": str(marked)}, "optim": {**recipe["optim"], "steps": 1}}, where="x")
    train_grpo(config, say=lambda text: None)
    ours = [tuple(pair.renderer(example).ids_P.tolist()) for example in read_examples(marked)]
    assert sorted(asked) == sorted(ids for ids in ours for _ in range(K))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"k": 1, "max_tokens": 6}}, "rollouts.k must be 2 or more, found 1"),
        ({"lora": {"rank": 4}}, "Leave out lora"),
    ],
)
def test_what_it_can_t_do_is_refused(recipe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_grpo(parse_config({**recipe, **changes}, where="recipe"))


def test_questions_without_answers_can_t_be_rewarded(recipe: dict[str, Any], tmp_path: Path) -> None:
    train = Path(recipe["data"]["train"])
    found = [json.loads(line) for line in train.read_text().splitlines()]
    for row in found:
        row.pop("answer")
    bare = train.with_name("bare.jsonl")
    bare.write_text("".join(json.dumps(row) + "\n" for row in found))
    config = parse_config({**recipe, "data": {**recipe["data"], "train": str(bare)}}, where="recipe")
    with pytest.raises(DataError, match="GRPO rewards right answers"):
        train_grpo(config, say=lambda text: None)


def test_a_mistake_is_one_message(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    monkeypatch.setattr("sys.argv", ["grpo", str(path), "--set", "rollouts.k=1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "rollouts.k must be 2 or more" in capsys.readouterr().err
