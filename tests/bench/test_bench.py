"""The benchmark at sizes of a second: its counts, its exactness, its keys, and what it says when a peer is missing."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from vaopd.bench import loss, run, trainer
from vaopd.bench.baseline import baseline_step, row_by_row
from vaopd.bench.page import show
from vaopd.bench.results import Results, bars, to_json
from vaopd.bench.rollout import engine_rollouts, generate_rollouts
from vaopd.bench.run import make_plan, run_bench, write_details, write_json
from vaopd.bench.shapes import Plan, Setting, Shape, Size, build_model, make_group, make_models, make_prompt, model_config
from vaopd.bench.step import BOTH_VIEWS, NO_VIEWS, arithmetic_ratio, gradient_error, package_step, scaling_formula, step_variants
from vaopd.bench.timing import Ratio, Times, over, take_turns
from vaopd.bench.work import Work, counted, rows_work, shared_work
from vaopd.errors import ConfigError
from vaopd.models.forward import rows
from vaopd.types import DEGRADED, ORIGINAL

SMALL = Size(hidden=32, layers=2, heads=2, key_heads=1, mlp=48, vision_hidden=16, vision_layers=2)
PLAN = Plan(
    shapes=(Shape(20, 6, 3),),
    vocab=1024,
    losses=((24, 512),),
    memory=(24, (256, 512)),
    loss_hidden=(8, 12),
    rounds=2,
    student=SMALL,
    teacher=SMALL,
)
STEP_KEYS = {"shared_va_over_rows_opd", "shared_va_over_shared_opd", "rows_va_over_rows_opd", "max_grad_rel_error"}
LOSS_KEYS = {"memory_over_materialised", "time_over_materialised", "time_over_trl", "time_over_liger"}
KEYS = {
    "work": {"decoder_tokens_ratio", "head_rows_ratio", "vision_runs_ratio", "matches_formula"},
    "step": {"P", "T", "K"} | STEP_KEYS,
    "loss": {"N", "V"} | LOSS_KEYS,
    "rollout": {"prefill_tokens_ratio", "speed_over_generate"},
    "trainer": {"opd_step_over_trl", "va_step_over_trl_opd"},
    "scaling": {"k8_over_k1", "k8_over_k1_formula"},
}


@pytest.fixture(scope="module")
def setting() -> Setting:
    student, teacher = make_models(PLAN)
    return Setting(student, teacher, (make_group(PLAN.shapes[0], PLAN.vocab, ragged=True),), PLAN.vocab)


@pytest.fixture(scope="module")
def results() -> Results:
    """One run without the peers, whether they are installed or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "PEERS", ("a_package_that_does_not_exist",))
        patch.setattr(loss, "VARIANTS", (("fused", None), ("materialised", None)))
        return run_bench(PLAN)


# --- what is compared -------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    assert Shape(10, 48, 4).lengths(ragged=False) == [48] * 4
    assert Shape(10, 48, 4).lengths(ragged=True) == [24, 40, 56, 72]
    assert Shape(10, 7, 1).lengths(ragged=True) == [7]
    for tokens in (12, 20, 112, 312):
        prompt = make_prompt(Shape(tokens, 4, 2), 1024)
        shown = int((prompt.ids_P == 1023).sum())
        assert len(prompt.ids_P) == tokens
        assert prompt.images[ORIGINAL]["image_grid_thw"].prod() == 4 * shown
        assert not torch.equal(prompt.images[ORIGINAL]["pixel_values"], prompt.images[DEGRADED]["pixel_values"])


@pytest.mark.parametrize("view", [ORIGINAL, DEGRADED])
def test_the_baseline_computes_the_same(setting: Setting, view: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            row_by_row(setting.student, setting.groups, view), rows(setting.student, setting.groups, view), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("views", [NO_VIEWS, BOTH_VIEWS])
def test_both_steps_have_one_loss(setting: Setting, views: tuple[str, ...]) -> None:
    assert float(package_step(setting, views)) == pytest.approx(float(baseline_step(setting, views)), rel=1e-4)


def test_mixed_precision_as_on_a_gpu(setting: Setting) -> None:
    """A teacher in bf16, a student in fp32 under autocast: every variant runs, and the losses stay together."""
    mixed = replace(setting, teacher=copy.deepcopy(setting.teacher).to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        losses = {name: float(run()) for name, run in step_variants(mixed).items()}
    assert losses["shared opd"] == pytest.approx(losses["rows opd"], rel=0.05)
    assert losses["shared va"] == pytest.approx(losses["rows va"], rel=0.2)


def test_gradients_are_those_of_rows(setting: Setting) -> None:
    assert gradient_error(setting) < 1e-5


def test_a_wrong_gradient_shows(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from vaopd.bench import step

    monkeypatch.setattr(step, "row_by_row", lambda model, groups, view: row_by_row(model, groups, DEGRADED))
    assert gradient_error(setting) > 1e-3


# --- the work ---------------------------------------------------------------------------------------------------------


def test_work_formulas_by_hand() -> None:
    """P = 20; lengths 3, 6, 9: packed 20 + 2 + 5 + 8 = 35 tokens, padded rows 3 · (20 + 8) = 84; three passes, four of the head."""
    groups = (make_group(PLAN.shapes[0], PLAN.vocab, ragged=True),)
    assert groups[0].lengths == [3, 6, 9]
    assert shared_work(groups) == Work(decoder_tokens=105, head_rows=72, vision_runs=3)
    assert rows_work(groups) == Work(decoder_tokens=252, head_rows=72, vision_runs=9)


@pytest.mark.parametrize("ragged", [False, True])
def test_counts_are_those_of_the_formulas(setting: Setting, ragged: bool) -> None:
    groups = tuple(make_group(PLAN.shapes[0], PLAN.vocab, ragged=ragged, seed=seed) for seed in range(2))
    both = replace(setting, groups=groups)
    assert counted(both, lambda: package_step(both, BOTH_VIEWS)) == shared_work(groups)
    assert counted(both, lambda: baseline_step(both, BOTH_VIEWS)) == rows_work(groups)


def test_opd_multiplies_by_a_head_in_the_loss_alone(setting: Setting) -> None:
    """Twice, by the teacher's and by the student's; its log-probabilities would be a third product that nothing reads."""
    tokens = sum(setting.groups[0].lengths)
    for way in (package_step, baseline_step):
        assert counted(setting, lambda way=way: way(setting, NO_VIEWS)).head_rows == 2 * tokens  # type: ignore[misc]


def test_whole_logits_are_counted(setting: Setting) -> None:
    """The count sees the head's own module too, over every position."""
    ids = torch.arange(10)[None]
    work = counted(setting, lambda: setting.student(input_ids=ids).logits.sum().backward())
    assert work == Work(decoder_tokens=10, head_rows=10, vision_runs=0)


def test_rollouts_have_one_length_and_no_control_ids() -> None:
    shape, model = PLAN.shapes[0], build_model(model_config(SMALL, PLAN.vocab), seed=0)
    prompt = make_prompt(shape, PLAN.vocab)
    for responses in (engine_rollouts(model, prompt, shape, PLAN.vocab)(), generate_rollouts(model, prompt, shape)()):
        assert [len(response) for response in responses] == [shape.T] * shape.K
        assert all(int(response.max()) < PLAN.vocab - 4 for response in responses)


def test_scaling_formula_by_hand() -> None:
    assert scaling_formula(Shape(100, 50, 4)) == pytest.approx(500 / 150)


def test_arithmetic_is_that_of_the_formula(setting: Setting) -> None:
    """Three siblings of a prompt of 20: less than the 2/1 of two views, more than the share of tokens that is left."""
    assert 35 / 84 < arithmetic_ratio(setting) < 2


# --- time -------------------------------------------------------------------------------------------------------------


def test_variants_take_turns() -> None:
    order: list[str] = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == list("ab" * 4)
    assert [len(times[name].seconds) for name in "ab"] == [3, 3]


def test_ratios_by_hand() -> None:
    assert over(Times((3.0, 1.0, 2.0)), Times((4.0, 8.0, 10.0))) == Ratio(least=0.25, median=0.25)


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_json_has_exactly_its_keys(results: Results, tmp_path: Path) -> None:
    write_json(results, tmp_path / "deep" / "bench.json")
    written = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert {key: set(part[0] if isinstance(part, list) else part) for key, part in written.items()} == KEYS
    assert written == to_json(results)
    assert len(written["step"]) == len(PLAN.shapes)
    assert len(written["loss"]) == len(PLAN.losses)


def test_what_the_run_says(results: Results) -> None:
    written = to_json(results)
    assert written["work"]["matches_formula"] is True
    assert written["work"]["decoder_tokens_ratio"] == pytest.approx(35 / 75, abs=1e-4)
    assert written["work"]["head_rows_ratio"] == 1.0
    assert written["work"]["vision_runs_ratio"] == pytest.approx(1 / 3, abs=1e-4)
    assert written["rollout"]["prefill_tokens_ratio"] == pytest.approx(1 / 3, abs=1e-4)
    assert 0 < written["step"][0]["max_grad_rel_error"] < 1e-5
    assert [written["loss"][0][key] for key in ("time_over_trl", "time_over_liger")] == [None, None]
    assert set(written["trainer"].values()) == {None}
    assert written["scaling"]["k8_over_k1_formula"] == pytest.approx((20 + 48) / 26, abs=1e-3)


def test_details_have_the_machine_and_every_round(results: Results, tmp_path: Path) -> None:
    write_details(results, tmp_path / "details.json")
    written = json.loads((tmp_path / "details.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert written["ratios"] == to_json(results)
    assert len(written["measured"]["steps"][0]["times"]["shared va"]["seconds"]) == PLAN.rounds


def test_the_page(results: Results) -> None:
    text = printed(results)
    assert "TRL is not installed" in text
    assert "pip install 'vaopd[bench]'" in text
    assert "exact" in text
    assert "bars met" in text


def test_a_missed_bar_is_named(results: Results) -> None:
    step = results.steps[0]
    missed = replace(results, steps=[replace(step, shape=Shape(312, 48, 4), max_grad_rel_error=1e-3, times=step.times | slow(step.times))])
    assert [bar.met for bar in bars(missed) if bar.name.startswith("step")] == [False, False]
    assert "missed step P=312 T=48: gradient error: 0.001" in printed(missed)


def slow(times: dict[str, Times]) -> dict[str, Times]:
    return {"shared va": Times(tuple(9 * x for x in times["rows opd"].seconds))}


def printed(results: Results) -> str:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    show(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- a process per kernel ---------------------------------------------------------------------------------------------


def test_a_kernel_in_its_own_process(results: Results) -> None:
    fused, whole = results.losses[0].kernels
    assert (fused.kernel, whole.kernel) == ("fused", "materialised")
    assert fused.error < 1e-5
    assert len(fused.times.seconds) == PLAN.rounds
    assert fused.peak_mib is None or fused.peak_mib >= 0


def test_memory_by_vocabulary(results: Results) -> None:
    """An H of 8 in fp32: the head's gradient is V · 8 · 4 bytes."""
    assert [(at.N, at.V, at.gradient) for at in results.memory] == [(24, 256, 1 / 128), (24, 512, 1 / 64)]
    known = replace(results, memory=[loss.MemoryResult(24, 256, 12.0, 48.0, 4.0), loss.MemoryResult(24, 512, None, None, 8.0)])
    lines = [line.split() for line in printed(known).splitlines()]
    assert ["256", "12", "4", "48", "0.25"] in lines
    assert ["512", "-", "8", "-", "-"] in lines


def test_a_missing_peer_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def fake(kernel: str, sizes: tuple[int, ...], tile: int | None) -> Iterator[Any]:
        yield FakeWorker(kernel)

    monkeypatch.setattr(loss, "worker", fake)
    found = loss.measure_loss(8, 16, (4, 4), rounds=2)
    assert {result.kernel for result in found.kernels} == {"fused", "materialised", "liger"}
    assert found.time_over("trl") is None
    assert found.time_over("materialised") == Ratio(0.5, 0.5)
    assert found.memory_over("materialised") == 0.5


class FakeWorker:
    """Whole logits take twice of everything."""

    def __init__(self, kernel: str) -> None:
        self.installed, self.factor = kernel != "trl", 2.0 if kernel == "materialised" else 1.0

    def ask(self, command: str) -> dict[str, float]:
        return {"error": 0.0} if command == "check" else {"seconds": self.factor, "peak_mib": 10 * self.factor}


def test_a_dead_process_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without an answer"), loss.worker("no such kernel", (4, 4, 4, 4), None):
        pass


# --- the command ------------------------------------------------------------------------------------------------------


def test_other_shapes() -> None:
    assert make_plan(None, None, None, None, 5) == Plan()
    assert make_plan(600, 500, None, None, 5).shapes == (Shape(600, 500, 4),)
    assert [shape.K for shape in make_plan(None, None, 8, None, 5).shapes] == [8, 8, 8]
    assert make_plan(None, None, None, 50_000, 5).losses == ((1024, 50_000),)


@pytest.mark.parametrize(
    "numbers", [(3, None, None, None, 5), (None, 1, None, None, 5), (None, None, 0, None, 5), (None, None, None, 9, 5)]
)
def test_sizes_that_cannot_be_are_refused(numbers: Any) -> None:
    with pytest.raises(ConfigError, match="at least"):
        make_plan(*numbers)


def test_the_command_writes_what_was_asked_for(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from vaopd.bench import command
    from vaopd.cli import app

    asked: list[Plan] = []
    monkeypatch.setattr(command, "run_bench", lambda plan, on_part: asked.append(plan) or results)
    path = tmp_path / "bench.json"
    ended = CliRunner().invoke(app, ["bench", "--p", "64", "--t", "32", "--rounds", "7", "--json", str(path)])
    assert ended.exit_code == 0, ended.output
    assert (asked[0].shapes, asked[0].rounds) == ((Shape(64, 32, 4),), 7)
    assert json.loads(path.read_text()) == to_json(results)


@pytest.mark.skipif(not trainer.installed(), reason="TRL is not installed")
def test_trl_trains_on_the_same() -> None:
    found = trainer.measure_trainers(replace(PLAN, shapes=(Shape(100, 4, 2),)))
    assert found is not None
    assert found.shape == Shape(100, 4, 2)
    assert {len(times.seconds) for times in found.times.values()} == {PLAN.rounds}


def test_versions_and_processor() -> None:
    host = run.machine()
    assert host["torch"] == torch.__version__
    assert host["threads used"] == 1
