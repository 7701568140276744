"""docs/families.md shows what the families declare and what is measured of them.

`PYTHONPATH=tests python tests/models/test_families_table.py` writes the table anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import family_checks as checks
from vaopd.models.families import FAMILIES
from vaopd.models.forward import rows
from vaopd.models.shared_prompt import shared

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEADER = ("`model_type`", "family", "placeholders of an image", "the vision tower reads", "positions", "rows", "shared prompt", "rollouts")
RULE = ("---",) * len(HEADER)
START, END = "<!-- written by tests/models/test_families_table.py -->\n", "<!-- end -->\n"


def within(*errors: float) -> str:
    """A measured error as the page shows it: the bound that it keeps, or itself."""
    return "≤ 1e-5" if max(errors) <= checks.BOUND else f"**{max(errors):.1e}**"


def row(model_type: str) -> tuple[str, ...]:
    """One line of the table: two thirds declared, one measured."""
    family = FAMILIES[model_type]
    by_rows = checks.way_gradients(model_type, rows)
    row_by_row = within(checks.rows_error(model_type), checks.gradient_error(by_rows, checks.plain_gradients(model_type)))
    if family.not_shared is None:
        packed = within(checks.shared_error(model_type), checks.gradient_error(checks.way_gradients(model_type, shared), by_rows))
    else:
        packed = f"no: {family.not_shared}"
    same = checks.greedy(model_type) == [[answer, answer] for answer in checks.generated(model_type)]
    rollouts = f"= generate, {within(checks.sampled_error(model_type))}" if same else "**differ from generate**"
    reads = ", ".join(f"`{name}`" for name in sorted(family.reads))
    axes = "M-RoPE, 3 axes" if family.axes == 3 else "1 axis"
    return f"`{model_type}`", family.title, family.placeholders, reads, axes, row_by_row, packed, rollouts


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def shown() -> list[str]:
    """The lines of the table on the page."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines(keepends=True)


def test_the_page_has_one_line_for_every_model_type() -> None:
    assert checks.BOUND == 1e-5
    assert shown()[:2] == [line(HEADER), line(RULE)]
    assert [cells.split("`")[1] for cells in shown()[2:]] == list(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_line_shows_what_is_declared_and_measured(model_type: str) -> None:
    expected = line(row(model_type))
    assert expected in shown(), f"docs/families.md is out of date. The line is now:\n{expected}"
    assert "**" not in expected, "a bound does not hold"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    table = "".join(line(cells) for cells in (HEADER, RULE, *map(row, FAMILIES)))
    PAGE.write_text(before + START + table + END + rest.partition(END)[2], encoding="utf-8")
