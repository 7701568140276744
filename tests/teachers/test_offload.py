"""Weights that visit the device: when they are there, that nothing else changes, and what the loss is given of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from small_pair import Pair, make_config, make_group
from vaopd.core import VAOPD
from vaopd.models.forward import rows
from vaopd.models.shared_prompt import Auto
from vaopd.teachers.local import LocalTeacher
from vaopd.teachers.offload import Visits
from vaopd.train import setup
from vaopd.train.step import StudentLoss, Tools, train_step
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt

CPU = torch.device("cpu")  # a device like any other: a visit copies to it


@pytest.fixture
def groups(prompts: list[Prompt]) -> list[Group]:
    return [make_group(prompt, (4, 2), seed) for seed, prompt in enumerate(prompts[:2])]


def places(model: Any) -> dict[str, int]:
    """Where each weight lies now."""
    return {name: x.data_ptr() for name, x in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}


def fresh_teacher(pair: Pair) -> Any:
    return copy.deepcopy(pair.teacher)


def test_every_weight_is_elsewhere_during_a_visit_and_home_after_it(pair: Pair) -> None:
    model = fresh_teacher(pair)
    visits = Visits(model, CPU)
    home = places(model)
    with visits(model):
        away = places(model)
        with visits(model):  # as when a teacher that is sampled from scores in between
            assert places(model) == away
        assert places(model) == away
    assert home.keys() == away.keys()
    assert not set(home.values()) & set(away.values())
    assert places(model) == home
    assert visits.bytes == sum(x.numel() * 4 for x in model.parameters()) + sum(x.numel() * x.element_size() for x in model.buffers())


def test_tied_weights_stay_one(pair: Pair) -> None:
    model = pair.fresh()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    visits = Visits(model, CPU)
    with visits(model):
        assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_weights_go_home_after_an_error(pair: Pair) -> None:
    model = fresh_teacher(pair)
    visits = Visits(model, CPU)
    home = places(model)
    with pytest.raises(RuntimeError, match="in between"), visits(model):
        raise RuntimeError("in between")
    assert places(model) == home
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Script:
    """An engine that gives prepared rollouts."""

    def __init__(self, groups: Sequence[Group], log: list[str], teacher_there: Callable[[], bool]) -> None:
        self.groups, self.log, self.teacher_there = groups, log, teacher_there

    def generate(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        self.log.append(f"rollouts, teacher {'there' if self.teacher_there() else 'away'}")
        return list(self.groups)


def one_step(pair: Pair, groups: Sequence[Group], offload: bool) -> tuple[dict[str, Any], list[Tensor], list[str]]:
    """Metrics, the student's weights after the step, and which phase found the teacher's weights on the device."""
    model, student, log = fresh_teacher(pair), pair.fresh(), []
    visits = Visits(model, CPU) if offload else None
    home = places(model)

    def there() -> bool:
        return not offload or places(model) != home

    def forward(model_: Any, batch: Sequence[Group], view: str) -> Tensor:
        log.append(f"{'teacher scores' if model_ is model else 'student learns'}, teacher {'there' if there() else 'away'}")
        return rows(model_, batch, view)

    teacher = LocalTeacher(
        model, vocab_size=pair.vocab_size, forward=forward, tokens_per_forward=999, within=visits, device=CPU if offload else None
    )
    loss = StudentLoss(student, vocab_size=pair.vocab_size, forward=forward, loss="reverse_kl")
    tools = Tools(
        engine=Script(groups, log, there),
        teacher=teacher,
        student_loss=loss,
        optimizer=torch.optim.SGD(loss.parameters(), lr=0.1),
        accelerator=Accelerator(cpu=True),
        views=(ORIGINAL, DEGRADED),
        k=2,
        deadband=1e-4,
        clip=1.0,
        tokens_per_forward=999,
    )
    metrics = train_step([group.prompt for group in groups], 1, VAOPD(), tools)
    assert not offload or not there()
    return metrics, [x.detach().clone() for x in student.parameters()], log


def test_a_step_is_the_same_to_the_bit_and_the_teacher_is_there_only_to_score(pair: Pair, groups: list[Group]) -> None:
    metrics, weights, _ = one_step(pair, groups, offload=False)
    offloaded, same, log = one_step(pair, groups, offload=True)
    assert offloaded == metrics
    assert all(torch.equal(x, y) for x, y in zip(weights, same, strict=True))
    assert log == [
        "rollouts, teacher away",
        "teacher scores, teacher there",  # original
        "teacher scores, teacher there",  # degraded
        "student learns, teacher away",
    ]


def test_the_loss_gets_the_head_where_it_computes(pair: Pair) -> None:
    model = fresh_teacher(pair)
    teacher = LocalTeacher(
        model, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=999, within=Visits(model, CPU), device=torch.device("meta")
    )
    assert teacher.head.weight_VH.device.type == "meta"
    assert model.get_output_embeddings().weight.device == CPU


def test_the_check_of_sharing_runs_where_the_weights_are(pair: Pair, groups: list[Group]) -> None:
    model = fresh_teacher(pair)
    teacher = LocalTeacher(model, vocab_size=pair.vocab_size, forward=Auto(), tokens_per_forward=999, within=Visits(model, CPU), device=CPU)
    plain = LocalTeacher(fresh_teacher(pair), vocab_size=pair.vocab_size, forward=Auto(), tokens_per_forward=999)
    for one, other in zip(teacher.score(groups), plain.score(groups), strict=True):
        assert torch.equal(one.hidden_NG, other.hidden_NG)


def test_on_a_cpu_it_does_nothing_and_says_so(pair: Pair, data: dict[str, str], tmp_path: Any) -> None:
    said: list[str] = []
    run = setup.set_up(make_config(tmp_path, pair, data, teacher_offload=True), on_check=said.append)
    assert run.teacher is not None
    assert run.teacher.within is None
    assert any("teacher_offload does nothing here" in line for line in said)


def test_on_a_gpu_it_says_what_it_frees(pair: Pair) -> None:
    model = fresh_teacher(pair)
    visits = Visits(model, CPU)
    teacher = LocalTeacher(model, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=999, within=visits, device=CPU)
    assert setup.offload_note(teacher) == f"teacher's {visits.bytes / 2**30:.1f} GiB in CPU memory, on the device only to score"
