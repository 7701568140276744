"""Every number of a recipe reaches what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from small_pair import Pair
from vaopd.config import RunConfig
from vaopd.data.sources import read_examples
from vaopd.errors import DataError
from vaopd.models.load import control_ids
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.train import loop
from vaopd.train.loop import train
from vaopd.train.prompts import PromptsAhead
from vaopd.train.schedule import learning_rate
from vaopd.train.setup import Run, held_out_sampling, precision, set_up
from vaopd.types import DEGRADED, ORIGINAL


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Accelerate fixes one precision for a process; this forgets it before and after a test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepare(config: RunConfig) -> Run:
    return set_up(config, on_check=lambda text: None)


def test_the_optimiser(recipe: Callable[..., RunConfig]) -> None:
    run = prepare(recipe(optim={"betas": [0.7, 0.8], "weight_decay": 0.3, "lr": 0.5, "clip": 0.25, "tokens_per_forward": 77}))
    (group,) = run.tools.optimizer.param_groups
    assert (tuple(group["betas"]), group["weight_decay"], group["lr"]) == ((0.7, 0.8), 0.3, 0.5)
    assert (run.tools.clip, run.tools.tokens_per_forward) == (0.25, 77)
    assert run.teacher is not None
    assert run.teacher.tokens_per_forward == 77
    assert {id(p) for p in group["params"]} == {id(p) for p in run.student.parameters()}


def test_the_rate_of_each_step_reaches_the_optimiser(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[int, float] = {}
    step_of = loop.train_step

    def recording(prompts: Any, step: int, weighting: Any, tools: Any) -> Any:
        rates[step] = tools.optimizer.param_groups[0]["lr"]
        return step_of(prompts, step, weighting, tools)

    monkeypatch.setattr(loop, "train_step", recording)
    config = recipe(data={"eval": None}, method="opd", optim={"steps": 4, "warmup": 0.5})
    train(config)
    assert rates == {step: learning_rate(config.optim, step, 4) for step in (1, 2, 3, 4)}
    assert rates == pytest.approx({1: 5e-4, 2: 1e-3, 3: 1e-3, 4: 5e-4})


def test_the_sampling(recipe: Callable[..., RunConfig], pair: Pair) -> None:
    run = prepare(recipe(rollouts={"k": 5, "max_tokens": 9, "temperature": 0.6, "top_p": 0.8, "rows": 7}, seed=11))
    engine = run.tools.engine
    assert isinstance(engine, HFEngine)
    assert engine.sampling == Sampling(9, 0.6, 0.8, 11)
    assert (engine.rows, engine.view, run.tools.k, engine.vocab_size) == (7, ORIGINAL, 5, pair.vocab_size)
    assert engine.model is run.student
    assert set(engine.eos_ids.tolist()) == pair.source.eos_ids
    assert engine.forbidden_V.nonzero().flatten().tolist() == sorted(control_ids(pair.source))


def test_the_sampling_of_evaluations(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """At its own temperature, from the whole distribution; the final one with other noise than those that chose the best checkpoint."""
    config = recipe(rollouts={"temperature": 0.6, "top_p": 0.8}, eval={"temperature": 0.9}, optim={"steps": 2}, seed=11)
    assert held_out_sampling(config, 5) == Sampling(6, 0.9, 1.0, 5)
    seen: list[Sampling] = []
    generate = HFEngine.generate

    def recording(self: HFEngine, *arguments: Any) -> Any:
        seen.append(self.sampling)
        return generate(self, *arguments)

    monkeypatch.setattr(HFEngine, "generate", recording)
    train(config)
    training, during, final = Sampling(6, 0.6, 0.8, 11), Sampling(6, 0.9, 1.0, 11), Sampling(6, 0.9, 1.0, 12)
    # The first draw is for the noise floor of the scores.
    assert seen == [training, during, training, training, during, final, final, final]


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize(("name", "bf16"), [("fp32", False), ("bf16", True)])
def test_rollouts_are_computed_in_the_precision_of_training(recipe: Callable[..., RunConfig], name: str, bf16: bool) -> None:
    engine = prepare(recipe(precision=name)).tools.engine
    assert isinstance(engine, HFEngine)
    assert engine.sampling.bf16 is held_out_sampling(recipe(precision=name), 0).bf16 is bf16


@pytest.mark.parametrize(
    ("method", "views"),
    [("va_opd", (ORIGINAL, DEGRADED)), ("token_only", (ORIGINAL, DEGRADED)), ("random_tokens", (ORIGINAL, DEGRADED)), ("opd", ())],
)
def test_the_views_that_the_weighting_reads(recipe: Callable[..., RunConfig], method: str, views: tuple[str, ...]) -> None:
    assert prepare(recipe(method=method)).tools.views == views


def test_the_view(recipe: Callable[..., RunConfig], data: dict[str, str]) -> None:
    example = read_examples(data["train"])[0]
    coarse, fine = (
        prepare(recipe(view={"ratio": ratio}, method="opd")).renderer.degraded_images(example)[0].getcolors(4096) for ratio in (0.1, 0.5)
    )
    assert coarse is not None
    assert fine is not None
    assert len(coarse) <= 9 < len(fine) <= 256, "32 pixels at 0.1 are 3 by 3, at 0.5 16 by 16"


def test_the_deadband_and_the_loss(recipe: Callable[..., RunConfig]) -> None:
    run = prepare(recipe(deadband=0.25, divergence="jsd:0.3"))
    assert run.tools.deadband == 0.25
    assert run.tools.student_loss.loss == "jsd:0.3"


@pytest.mark.usefixtures("any_precision")
def test_weights_are_trained_in_fp32_and_the_student_stays_in_evaluation_mode(recipe: Callable[..., RunConfig]) -> None:
    run = prepare(recipe(precision="bf16"))
    assert run.teacher is not None
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}
    assert {p.dtype for p in run.teacher.model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in run.student.modules()), "dropout would make the policy another one than the sampler's"


def test_precision_follows_the_machine(recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert precision(recipe(precision="auto")) == expected
        assert precision(recipe(precision="fp32")) == "no"


def test_the_test_set_is_the_held_out_one_unless_named(recipe: Callable[..., RunConfig], data: dict[str, str]) -> None:
    run = prepare(recipe())
    assert run.test is run.held_out
    assert [example.id for example in prepare(recipe(data={"test": data["eval"], "eval": None})).test] == ["eval-0", "eval-1", "eval-2"]
    with pytest.raises(DataError):
        prepare(recipe(data={"test": data["train"]}))


@pytest.mark.parametrize("forward", ["rows", "auto"])
def test_recomputing_activations_changes_nothing_but_the_work(recipe: Callable[..., RunConfig], forward: str) -> None:
    """The same run to rounding, with every decoder layer computed once more in the backward."""

    def one_step(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        run = prepare(recipe(forward=forward, optim={"steps": 1, "checkpointing": checkpointing}))
        layer = run.student.get_decoder().layers[0]
        calls: list[int] = []
        # Before the forward: recomputation stops as soon as it has what the backward needs, which may be inside the last module.
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1) if torch.is_grad_enabled() else None)
        loop._one_step(run, 1, PromptsAhead(run, ThreadPoolExecutor(1)))
        return [p.detach().clone() for p in run.student.parameters()], len(calls)

    (plain, once), (recomputed, twice) = one_step(False), one_step(True)
    assert twice == 2 * once > 0
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
