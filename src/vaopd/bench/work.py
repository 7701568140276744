"""The work of a step, counted while it runs, and the formulas that it must equal exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vaopd.bench.baseline import baseline_step
from vaopd.bench.shapes import Plan, Setting, make_group, make_models
from vaopd.bench.step import BOTH_VIEWS, package_step
from vaopd.types import Group

PASSES = 3  # of a VA-OPD step: the teacher under each view, the student
HEAD_PASSES = 4  # log-probabilities of two views, the loss of teacher and student


@dataclass
class Work:
    """Of all models together."""

    decoder_tokens: int = 0  # positions through a decoder layer, padding included
    head_rows: int = 0  # hidden states multiplied by an LM head
    vision_runs: int = 0  # pictures through a vision tower


@dataclass(frozen=True)
class WorkResult:
    """Counts of one VA-OPD step, equal or ragged lengths."""

    ragged: bool
    shared: Work
    rows: Work
    matches_formula: bool


def shared_work(groups: Sequence[Group]) -> Work:
    """Each prompt once, each sibling behind it without its last token: P + Σ (T - 1)."""
    tokens = sum(len(group.prompt.ids_P) + sum(length - 1 for length in group.lengths) for group in groups)
    return Work(PASSES * tokens, HEAD_PASSES * _response_tokens(groups), PASSES * len(groups))


def rows_work(groups: Sequence[Group]) -> Work:
    """Each row has its prompt, and all are padded to the longest: R · max (P + T - 1)."""
    rows = [len(group.prompt.ids_P) + length - 1 for group in groups for length in group.lengths]
    return Work(PASSES * len(rows) * max(rows), HEAD_PASSES * _response_tokens(groups), PASSES * len(rows))


def _response_tokens(groups: Sequence[Group]) -> int:
    return sum(sum(group.lengths) for group in groups)


def measure_work(plan: Plan) -> list[WorkResult]:
    """A VA-OPD step of the first shape both ways, with equal and with ragged lengths."""
    student, teacher = make_models(plan)
    return [_compare(Setting(student, teacher, (make_group(plan.shapes[0], plan.vocab, ragged=r),), plan.vocab), r) for r in (False, True)]


def _compare(setting: Setting, ragged: bool) -> WorkResult:
    shared, rows = (counted(setting, partial(way, setting, BOTH_VIEWS)) for way in (package_step, baseline_step))
    expected = shared_work(setting.groups), rows_work(setting.groups)
    return WorkResult(ragged, shared, rows, asdict(shared) == asdict(expected[0]) and asdict(rows) == asdict(expected[1]))


def counted(setting: Setting, run: Callable[[], object]) -> Work:
    """The work of both models while `run` runs."""
    work = Work()
    with ExitStack() as stack:
        for model in (setting.student, setting.teacher):
            stack.enter_context(counting(model, work))
        run()
    return work


@contextmanager
def counting(model: Any, work: Work) -> Iterator[None]:
    """Adds up what goes through the model: hooks on its modules, and products with the weight of its head.

    The package multiplies by the head's weight without calling the module, so a hook of the module would miss it.
    """

    def decoder(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        work.decoder_tokens += states.shape[:-1].numel()

    def vision(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        work.vision_runs += len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])

    hooks = [
        model.get_decoder().layers[0].register_forward_pre_hook(decoder, with_kwargs=True),
        model.model.visual.register_forward_pre_hook(vision, with_kwargs=True),
    ]
    try:
        with HeadRows(model.get_output_embeddings().weight, work):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class HeadRows(TorchDispatchMode):
    """Counts the rows of every product `hidden · weightᵀ`; the products of the backward contract over the vocabulary instead."""

    def __init__(self, weight_VH: Tensor, work: Work) -> None:
        super().__init__()
        self.storage, self.width, self.work = weight_VH.untyped_storage().data_ptr(), weight_VH.shape[1], work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            if right.untyped_storage().data_ptr() == self.storage and left.shape[1] == self.width:
                self.work.head_rows += len(left)
        return func(*args, **(kwargs or {}))
