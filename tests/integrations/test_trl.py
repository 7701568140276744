"""VA-OPD inside TRL against `train_step`, on the same models, prompts and rollouts. Needs TRL: `make test-peers`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from small_pair import Pair, make_pair, picture, random_responses
from vaopd.core import OPD, VAOPD, RolloutOnly, TokenOnly, Weighting, fused_weighted_divergence, token_coefficients, visual_advantage
from vaopd.data.images import png_bytes
from vaopd.data.render import Renderer
from vaopd.errors import ConfigError, DataError
from vaopd.models.forward import rows
from vaopd.teachers.local import LocalTeacher
from vaopd.train.step import StudentLoss, Tools, train_step
from vaopd.types import DEGRADED, ORIGINAL, Example, Group
from vaopd.views import view

pytest.importorskip("trl")
pytest.importorskip("datasets")

from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from vaopd.integrations import trl as adapter
from vaopd.integrations.trl import HOOKS, VAOPDConfig, VAOPDTrainer, check_hooks

K = 3
QUESTIONS = [
    "How long is the longest side?",
    "Find the perimeter of the figure.",
    "How long is the whole outline?",
    "Which side is longest?",
]
SIZES = [[(32, 32)], [(64, 32)], [(32, 48), (48, 16)], [(48, 48)]]
LENGTHS = [(6, 2, 9), (3, 5, 4), (7, 1, 2), (4, 8, 3)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One step's prompts and rollouts, as TRL is given them and as `train_step` is."""

    rows: list[dict[str, Any]]
    groups: list[Group]

    def response(self, prompt_ids: list[int], sibling: int) -> list[int]:
        """What the student "samples": found by the prompt, so that it doesn't depend on the order of the rows."""
        (group,) = [group for group in self.groups if group.prompt.ids_P.tolist() == list(prompt_ids)]
        return group.responses[sibling].tolist()


@pytest.fixture(scope="module")
def case(pair: Pair) -> Case:
    return make_case(pair)


def make_case(pair: Pair) -> Case:
    examples, table = [], []
    for index, (question, sizes) in enumerate(zip(QUESTIONS, SIZES, strict=True)):
        images = [picture(*size, seed=10 * index + place) for place, size in enumerate(sizes)]
        examples.append(Example(str(index), tuple(png_bytes(image) for image in images), question))
        table.append({"prompt": [{"role": "user", "content": question}], "images": images})
    prompts = [pair.renderer(example) for example in examples]
    groups = [
        Group(prompt, random_responses(lengths, seed), (True,) * K)
        for seed, (prompt, lengths) in enumerate(zip(prompts, LENGTHS, strict=True))
    ]
    return Case(table, groups)


class Record(TrainerCallback):
    """The gradients with which the optimiser is about to step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Scripted(VAOPDTrainer):
    """Gives the case's responses instead of sampling."""

    case: Case

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, has_tool_images: bool = False) -> Any:
        siblings = K if self.model.training else 1
        return [self.case.response(ids, index % siblings) for index, ids in enumerate(prompt_ids)]


def make_args(folder: Path, **changes: Any) -> VAOPDConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "k": K,
        "per_device_train_batch_size": 2 * K,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_completion_length": 9,
        "learning_rate": 0.0,
        "max_grad_norm": 1e9,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    return VAOPDConfig(**values)


def make_trainer(pair: Pair, case: Case, folder: Path, kind: type[VAOPDTrainer] = Scripted, **changes: Any) -> Any:
    trainer = kind(
        model=pair.fresh(),
        teacher_model=copy.deepcopy(pair.teacher),
        args=make_args(folder, **changes),
        train_dataset=case.rows if pil_inside(case) else Dataset.from_list(case.rows),
        processing_class=left_padding(pair),
    )
    trainer.case = case  # type: ignore[attr-defined]
    return trainer


def pil_inside(case: Case) -> bool:
    """Whether images are parts of messages, where a Dataset would write them as bytes."""
    return not isinstance(case.rows[0]["prompt"][0]["content"], str)


def left_padding(pair: Pair) -> Any:
    processor = copy.deepcopy(pair.source.processor)
    processor.tokenizer.padding_side = "left"
    return processor


def trl_step(pair: Pair, case: Case, folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What TRL logs of one step, and its gradients."""
    trainer, record = make_trainer(pair, case, folder, **changes), Record()
    trainer.add_callback(record)
    trainer.train()
    return trainer.state.log_history[0], record.gradients


def our_step(pair: Pair, case: Case, weighting: Weighting, divergence: str = "reverse_kl") -> tuple[dict[str, Any], dict[str, Tensor]]:
    model, gradients = pair.fresh(), {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    class Script:
        def generate(self, prompts: Any, k: int, step: int) -> list[Group]:
            return case.groups

    tools = Tools(
        engine=Script(),
        teacher=LocalTeacher(pair.teacher, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=100_000),
        student_loss=StudentLoss(model, vocab_size=pair.vocab_size, forward=rows, loss=divergence),
        optimizer=Recorder(model.parameters(), lr=0.0),
        accelerator=Accelerator(cpu=True),
        views=(ORIGINAL, DEGRADED),
        k=K,
        deadband=1e-4,
        clip=1e9,
        tokens_per_forward=100_000,
    )
    return train_step([group.prompt for group in case.groups], 1, weighting, tools), gradients


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| over all parameters."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    return math.sqrt(difference / sum(float(gradient.double().square().sum()) for gradient in expected.values()))


SETTINGS: dict[str, tuple[dict[str, Any], Weighting, str]] = {
    "va_opd": ({}, VAOPD(), "reverse_kl"),
    "numbers": ({"tau": 0.4, "lam": 0.7, "p_visual": 0.3}, VAOPD(tau=0.4, lam=0.7, p_visual=0.3), "reverse_kl"),
    "opd": ({"method": "opd"}, OPD(), "reverse_kl"),
    "rollout_only": ({"method": "rollout_only"}, RolloutOnly(), "reverse_kl"),
    "token_only": ({"method": "token_only", "lam": 0.8}, TokenOnly(lam=0.8), "reverse_kl"),
    "jsd": ({"divergence": "jsd:0.3"}, VAOPD(), "jsd:0.3"),
    "one micro-batch": ({"per_device_train_batch_size": 4 * K, "gradient_accumulation_steps": 1}, VAOPD(), "reverse_kl"),
    "siblings apart": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}, VAOPD(), "reverse_kl"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_of_trl_is_a_step_of_ours(pair: Pair, case: Case, tmp_path: Path, name: str) -> None:
    changes, weighting, divergence = SETTINGS[name]
    logged, gradients = trl_step(pair, case, tmp_path, **changes)
    metrics, expected = our_step(pair, case, weighting, divergence)
    assert logged["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert relative(gradients, expected) <= 1e-5
    vision = {key: gradient for key, gradient in expected.items() if "visual" in key}
    assert relative({key: gradients[key] for key in vision}, vision) <= 1e-5
    if name == "one micro-batch":  # else a mean of means
        assert logged["kl"] == pytest.approx(metrics["kl"], rel=1e-4)
    assert logged["effective_rollouts"] == pytest.approx(metrics["effective_rollouts"], rel=1e-4)
    assert "entropy" not in logged
    if not isinstance(weighting, OPD):
        assert logged["va"] == pytest.approx(metrics["va"], rel=1e-4)


def swapped(weighting: Weighting, original_N: Tensor, degraded_N: Tensor, *, deadband: float) -> Tensor:
    return visual_advantage(degraded_N, original_N, deadband=deadband)


def one_group(a_N: Tensor, rollout_N: Tensor, group_R: Tensor, weighting: Weighting) -> Tensor:
    return token_coefficients(a_N, rollout_N, torch.zeros_like(group_R), weighting)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the sign of eq. 2": lambda patch: patch.setattr(adapter, "advantage_for", swapped),
    "one view twice": lambda patch: patch.setattr(VAOPDTrainer, "_degraded_pixels", lambda self, batch: batch["pixel_values"]),
    "all prompts in one group": lambda patch: patch.setattr(adapter, "token_coefficients", one_group),
    "siblings from other prompts": lambda patch: patch.setattr(
        adapter, "_groups", lambda batch, k: torch.arange(len(batch["prompt_ids"])) % 4
    ),
    "the divergence turned round": lambda patch: patch.setattr(
        adapter,
        "fused_weighted_divergence",
        lambda *given, **named: fused_weighted_divergence(*given, **{**named, "divergence": "forward_kl"}),
    ),
    "a mean over tokens": lambda patch: patch.setattr(
        adapter, "fused_weighted_divergence", lambda *given, **named: fused_weighted_divergence(*given, **{**named, "normalizer": 54.0})
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows(pair: Pair, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    MISTAKES[mistake](monkeypatch)
    _, gradients = trl_step(pair, case, tmp_path)
    assert relative(gradients, our_step(pair, case, VAOPD())[1]) > 0.01


@pytest.mark.parametrize("options", [{"name": "blur", "radius": 0.3}, {"name": "pixelate", "ratio": 0.3, "resolution": "shown"}])
def test_the_view_is_the_recipes(pair: Pair, case: Case, tmp_path: Path, options: dict[str, Any]) -> None:
    render = Renderer(pair.source.processor, view(**options))
    groups = [
        dataclasses.replace(
            group, prompt=render(Example(group.prompt.id, tuple(map(png_bytes, row["images"])), row["prompt"][0]["content"]))
        )
        for group, row in zip(case.groups, case.rows, strict=True)
    ]
    _, gradients = trl_step(pair, case, tmp_path, view=options)
    assert relative(gradients, our_step(pair, Case(case.rows, groups), VAOPD())[1]) <= 1e-5
    assert relative(gradients, our_step(pair, case, VAOPD())[1]) > 1e-3


def without_image(pair: Pair, case: Case, *places: int) -> Case:
    """The case with these prompts' images left out."""
    table, groups = list(case.rows), list(case.groups)
    for place in places:
        prompt = pair.renderer(Example(str(place), (), QUESTIONS[place]))
        table[place], groups[place] = {**table[place], "images": []}, dataclasses.replace(groups[place], prompt=prompt)
    return Case(table, groups)


def test_prompts_without_images_depend_on_none(pair: Pair, case: Case, tmp_path: Path) -> None:
    text = without_image(pair, case, 0, 1, 2, 3)
    logged, gradients = trl_step(pair, text, tmp_path)
    assert relative(gradients, our_step(pair, text, VAOPD())[1]) <= 1e-5
    assert logged["va"] == 0.0


def test_rows_with_and_without_images_in_one_batch(pair: Pair, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL hands the processor None for a row without images, which Qwen-VL's refuses; here it learns to take it."""
    kind = type(pair.source.processor.image_processor)
    fetch = kind.fetch_images
    monkeypatch.setattr(kind, "fetch_images", lambda self, images: [] if images is None else fetch(self, images))
    mixed = without_image(pair, case, 2)
    logged, gradients = trl_step(pair, mixed, tmp_path)
    metrics, expected = our_step(pair, mixed, VAOPD())
    assert relative(gradients, expected) <= 1e-5
    assert logged["va"] == pytest.approx(metrics["va"], rel=1e-4)


def test_one_image_in_a_column_and_images_in_the_messages(pair: Pair, case: Case, tmp_path: Path) -> None:
    def inside(row: dict[str, Any]) -> dict[str, Any]:
        parts = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": row["prompt"][0]["content"]}]
        return {"prompt": [{"role": "user", "content": parts}]}

    kept = [0, 1, 3]
    single = Case([case.rows[index] for index in kept], [case.groups[index] for index in kept])
    forms = {
        "column": [{"prompt": row["prompt"], "image": row["images"][0]} for row in single.rows],
        "messages": [inside(row) for row in single.rows],
    }
    expected = our_step(pair, single, VAOPD())[1]
    for name, table in forms.items():
        trainer, record = (
            make_trainer(pair, Case(table, single.groups), tmp_path, per_device_train_batch_size=9, gradient_accumulation_steps=1),
            Record(),
        )
        trainer.add_callback(record)
        trainer.train()
        assert relative(record.gradients, expected) <= 1e-5, name


def test_an_evaluation_has_one_rollout_a_prompt(pair: Pair, case: Case, tmp_path: Path) -> None:
    trainer = make_trainer(pair, case, tmp_path, per_device_eval_batch_size=4)
    found = trainer.evaluate(trainer.train_dataset)
    single = Case(case.rows, [group.take([0]) for group in case.groups])
    assert found["eval_loss"] == pytest.approx(our_step(pair, single, VAOPD())[0]["loss"], rel=1e-5)
    assert found["eval_effective_rollouts"] == pytest.approx(1.0)


def test_it_trains_on_what_it_samples(pair: Pair, case: Case, tmp_path: Path) -> None:
    """Unscripted, with gradient checkpointing: finite, saved, and the student moves while the teacher doesn't."""
    changes = {"max_steps": 2, "learning_rate": 1e-2, "max_completion_length": 4, "gradient_checkpointing": True}
    trainer = make_trainer(pair, case, tmp_path, VAOPDTrainer, save_strategy="steps", save_steps=2, **changes)
    before = [p.detach().clone() for p in trainer.teacher_model.parameters()]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert losses[0] != losses[1]
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    moved = [not torch.equal(new, old) for new, old in zip(trainer.model.parameters(), pair.student.parameters(), strict=True)]
    assert all(moved)
    assert all(torch.equal(p, old) for p, old in zip(trainer.teacher_model.parameters(), before, strict=True))


@pytest.mark.slow
def test_two_processes_take_one_step(pair: Pair, case: Case, tmp_path: Path) -> None:
    """Two prompts each, gradients averaged: the step of one process with four prompts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent), *sys.path])
    code = "import sys, test_trl; test_trl.one_of_two(sys.argv[1])"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=400)
        assert worker.returncode == 0, output
    found = torch.load(tmp_path / "found.pt")
    metrics, expected = our_step(pair, case, VAOPD())
    assert found["processes"] == 2
    assert relative(found["gradients"], expected) <= 1e-5
    assert found["logged"]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert found["logged"]["va"] == pytest.approx(metrics["va"], rel=1e-4)
    assert found["logged"]["effective_rollouts"] == pytest.approx(metrics["effective_rollouts"], rel=1e-4)


def one_of_two(folder: str) -> None:
    """What each process of the test above runs."""
    pair = make_pair(Path(tempfile.mkdtemp()))
    case, record = make_case(pair), Record()
    trainer = make_trainer(pair, case, Path(folder), per_device_train_batch_size=K, gradient_accumulation_steps=2, ddp_backend="gloo")
    trainer.add_callback(record)
    trainer.train()
    if trainer.accelerator.is_main_process:
        gradients = {name.removeprefix("module."): gradient for name, gradient in record.gradients.items()}
        found = {"gradients": gradients, "logged": trainer.state.log_history[0], "processes": trainer.accelerator.num_processes}
        torch.save(found, Path(folder) / "found.pt")


def test_the_page_runs(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/other_trainers.md with small models, on a CPU, for one step."""
    page = (Path(__file__).parents[2] / "docs/other_trainers.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "vaopd.integrations.trl" in block)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(16):
        picture(32, 32, seed=index).save(pictures / f"{index}.png")
    changes = {
        '"pictures"': repr(str(pictures)),
        '"runs/trl"': repr(str(tmp_path / "run")),
        '"Qwen/Qwen3-VL-2B-Instruct"': repr(str(pair.student_folder)),
        '"Qwen/Qwen3-VL-8B-Instruct"': repr(str(pair.teacher_folder)),
        ": 1024}": ": 4}",
        "**sampling)": "**sampling, use_cpu=True, bf16=False, report_to=[], max_steps=1, logging_steps=1, save_strategy='no')",
        "train_dataset=data)": "train_dataset=data, processing_class=processor)",
    }
    for old, new in changes.items():
        assert old in block, old
        block = block.replace(old, new)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names: dict[str, Any] = {"processor": left_padding(pair)}
    exec(compile(block, "docs/other_trainers.md", "exec"), names)
    (step,) = (row for row in names["trainer"].state.log_history if "loss" in row)
    assert step["loss"] > 0
    assert 1 < step["effective_rollouts"] < 4


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "vaopd"}, "Did you mean 'va_opd'"),
        ({"method": "opd", "tau": 1.0}, "'opd' has no number 'tau'"),
        ({"method": "random_tokens"}, "must be one of va_opd"),
        ({"tau": 0.0}, "tau must be a finite number above 0"),
        ({"p_visual": 2.0}, "p_visual is a share"),
        ({"view": "pixelated"}, "Did you mean 'pixelate'"),
        ({"view": {"name": "blur", "ratio": 0.1}}, "has no option 'ratio'"),
        ({"deadband": -1.0}, "deadband is a size"),
        ({"divergence": "reverse"}, "Did you mean 'reverse_kl'"),
        ({"beta": 0.5}, "divergence='jsd:0.5'"),
        ({"k": 5}, "2.*= 12 rows.*multiple of k \\(5\\).*Take 10 rows"),
        ({"k": 0}, "multiple of k"),
    ],
)
def test_a_mistake_in_the_arguments_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_args(tmp_path, **changes)


def test_what_the_trainer_refuses(pair: Pair, case: Case, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": pair.student,
        "teacher_model": pair.teacher,
        "args": make_args(tmp_path),
        "train_dataset": Dataset.from_list(case.rows),
        "processing_class": left_padding(pair),
    }
    plain = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    stream = given["train_dataset"].to_iterable_dataset()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"args": plain}, "must be a VAOPDConfig"),
        ({"teacher_model": None}, "teacher_model is missing"),
        ({"tools": [print]}, "tools put text"),
        ({"train_dataset": stream}, "must be a Dataset"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            VAOPDTrainer(**{**given, **changes})
    short = make_trainer(pair, Case(case.rows[:2], case.groups), tmp_path)
    with pytest.raises(ConfigError, match="takes 4 prompts, but the training data has 2"):
        short.train()


def test_images_of_another_kind_and_scattered_rows_are_refused() -> None:
    with pytest.raises(DataError, match="must be PIL images, found str"):
        adapter._degrade("a.png", view(), None)
    with pytest.raises(DataError, match="must keep the size"):
        adapter._degrade(picture(32, 32), lambda image, shown_size: Image.new("RGB", (1, 1)), None)
    together, apart = torch.tensor([[1], [1], [2], [2]]), torch.tensor([[1], [2], [1], [2]])
    assert adapter._groups({"prompt_ids": together}, 2).tolist() == [0, 0, 1, 1]
    for rows_RP, k in ((apart, 2), (together, 3)):
        with pytest.raises(ConfigError, match="must be of one prompt"):
            adapter._groups({"prompt_ids": rows_RP}, k)


@pytest.mark.parametrize("name", HOOKS)
def test_another_trl_is_refused(name: str) -> None:
    """A parameter more, or no such method: nothing of it would fail by itself."""

    def other(self: Any, something: Any) -> None: ...

    check_hooks(DistillationTrainer, "1.16.0")
    with pytest.raises(ConfigError, match=rf"{name}\(self, .*TRL 1.17.0 has {name}\(self, something\).*trl==1.16"):
        check_hooks(type("DistillationTrainer", (DistillationTrainer,), {name: other}), "1.17.0")
    with pytest.raises(ConfigError, match="has no such method"):
        check_hooks(type("DistillationTrainer", (DistillationTrainer,), {name: None}), "1.17.0")


def test_another_trl_with_the_same_hooks_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_hooks(DistillationTrainer, "1.17.2")
    assert "1.17.2" in caplog.text
    caplog.clear()
    check_hooks(DistillationTrainer, "1.16.3")
    assert not caplog.text
