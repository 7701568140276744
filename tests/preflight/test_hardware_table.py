"""docs/data.md says what the paper's settings take on which hardware, as the estimates have it for the published configurations.

`PYTHONPATH=tests python tests/preflight/test_hardware_table.py` writes the table anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from vaopd.bench.gpu import real_config
from vaopd.cli import _shipped
from vaopd.config import RunConfig, load_config
from vaopd.preflight.check import gib
from vaopd.preflight.cost import DEVICES, evaluation_seconds, step_cost
from vaopd.preflight.memory import Model, Work, estimate, measure

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
HEADER = ("teacher", "student", "hardware", "`--set`", "peak, GiB", "fits", "hours: training + evaluations")
RULE = ("---",) * len(HEADER)
START, END = "<!-- written by tests/preflight/test_hardware_table.py -->\n", "<!-- end -->\n"
PAPER = Work(prompt=600, response=1024, patches=2000)  # a picture of 500 image tokens and a question
TRAIN, HELD_OUT, TEST = 2101, 300, 601  # rows of Geometry3K's splits
CARDS = {"H100": "80 GB (H100)", "RTX 4090": "24 GB (RTX 4090)"}
LORA = ("lora.rank=16", "optim.lr=2e-5")
SMALL = ("rollouts.rows=16", "optim.tokens_per_forward=6144")


@dataclass(frozen=True)
class Plan:
    """One line of the table."""

    teacher: str
    card: str
    settings: tuple[str, ...] = ()
    processes: int = 1

    def recipe(self, name: str = "geometry3k") -> RunConfig:
        """The shipped recipe with what the line sets."""
        teacher = () if self.teacher == "8B" else (f"teacher=Qwen/Qwen3-VL-{self.teacher}-Instruct",)
        return load_config(_shipped(Path(name)), [*teacher, *self.settings])


PLANS = [
    Plan("4B", "H100"),
    Plan("8B", "H100"),
    Plan("8B", "H100", ("teacher_offload=true",)),
    Plan("32B", "H100", ("teacher_offload=true",)),
    Plan("32B", "H100", (*LORA, "teacher_offload=true", "rollouts.rows=16")),
    Plan("4B", "RTX 4090"),
    Plan("4B", "RTX 4090", (*LORA, *SMALL)),
    Plan("8B", "RTX 4090", (*LORA, *SMALL)),
    Plan("8B", "RTX 4090", (*LORA, "teacher_offload=true", *SMALL)),
    Plan("4B", "H100", processes=8),
    Plan("8B", "H100", processes=8),
    Plan("32B", "H100", (*LORA, "teacher_offload=true", "rollouts.rows=16"), 8),
]


@lru_cache(maxsize=8)
def teacher_of(size: str) -> Model:
    return measure(real_config(size))


@lru_cache(maxsize=8)
def student_of(lora: bool) -> Model:
    """The 2B, whole or with adapters: what a recipe says beside that doesn't change what is trained."""
    return measure(real_config("2B"), load_config(_shipped(Path("geometry3k")), ["lora.rank=16"] if lora else []))


def peak_of(plan: Plan, name: str = "geometry3k") -> int:
    """Bytes."""
    recipe = plan.recipe(name)
    student = student_of(recipe.lora is not None)
    return estimate(recipe, student, teacher_of(plan.teacher), PAPER, gpu=True, bf16=True, processes=plan.processes).peak


def hours_of(plan: Plan) -> tuple[float, float]:
    """(training, evaluations) on Geometry3K."""
    recipe, device = plan.recipe(), DEVICES[plan.card]
    student, teacher = student_of(recipe.lora is not None), teacher_of(plan.teacher)
    steps = math.ceil(TRAIN * recipe.optim.epochs / recipe.optim.prompts_per_step)
    step = step_cost(recipe, student, teacher, PAPER, device, processes=plan.processes).seconds
    evaluations = evaluation_seconds(recipe, student, teacher, device, steps=steps, held_out=HELD_OUT, test=TEST)
    assert step is not None
    assert evaluations is not None
    return steps * step / 3600, evaluations / 3600


def row(plan: Plan) -> tuple[str, ...]:
    """One line."""
    recipe, peak = plan.recipe(), peak_of(plan)
    fits = peak < DEVICES[plan.card].memory
    settings = [f"teacher=Qwen/Qwen3-VL-{plan.teacher}-Instruct"] * (plan.teacher != "8B") + list(plan.settings)
    count = {1: "one", 8: "eight"}[plan.processes]
    training, evaluations = hours_of(plan)
    return (
        plan.teacher,
        "LoRA" if recipe.lora else "all weights",
        f"{count} {CARDS[plan.card]}",
        f"`{' '.join(settings)}`" if settings else "nothing",
        gib(peak),
        "yes" if fits else "**no**",
        f"{training:.1f} + {evaluations:.1f}" if fits else "–",
    )


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def shown() -> list[str]:
    """The lines of the table on the page."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines(keepends=True)


def test_the_page_has_the_lines_of_the_estimates() -> None:
    expected = [line(cells) for cells in (HEADER, RULE, *map(row, PLANS))]
    assert shown() == expected, "docs/data.md is out of date. The table is now:\n" + "".join(expected)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.teacher}-{plan.card}-{plan.processes}-{len(plan.settings)}")
def test_both_recipes_have_the_papers_settings_and_one_peak(plan: Plan) -> None:
    for name in ("geometry3k", "virl39k"):
        recipe = plan.recipe(name)
        optim = recipe.optim
        assert (optim.lr, optim.betas, optim.weight_decay, optim.warmup) == (2e-5 if recipe.lora else 1e-6, (0.9, 0.95), 0.1, 0.05)
        assert (recipe.rollouts.k, optim.prompts_per_step, recipe.rollouts.max_tokens) == (4, 16, 1024)
        assert peak_of(plan, name) == peak_of(plan)


def test_every_kind_of_hardware_has_a_line_that_fits() -> None:
    fitting = {(plan.teacher, plan.card, plan.processes) for plan in PLANS if peak_of(plan) < DEVICES[plan.card].memory}
    assert fitting >= {(size, "H100", 1) for size in ("4B", "8B", "32B")} | {(size, "RTX 4090", 1) for size in ("4B", "8B")}
    assert fitting >= {(size, "H100", 8) for size in ("4B", "8B", "32B")}


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    table = "".join(line(cells) for cells in (HEADER, RULE, *map(row, PLANS)))
    PAGE.write_text(before + START + table + END + rest.partition(END)[2], encoding="utf-8")
    print(table)
