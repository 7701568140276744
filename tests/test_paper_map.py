"""docs/paper_map.md names functions and tests that exist, and leaves out no equation and no weighting."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import vaopd.core

ROOT = Path(__file__).parent.parent
ROWS = [
    line for line in (ROOT / "docs/paper_map.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "vaopd." in line
]
FUNCTION = re.compile(r"`(vaopd(?:\.\w+)+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def resolve(dotted: str) -> Any:
    """The object behind a dotted name: the longest prefix that is a module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not dotted.startswith(error.name):
                raise  # a module exists, but something it needs does not
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("row", ROWS, ids=[FUNCTION.findall(row)[0] for row in ROWS])
def test_row_names_what_exists(row: str) -> None:
    functions, tests = FUNCTION.findall(row), TEST.findall(row)
    assert functions
    assert tests
    assert all(callable(resolve(dotted)) for dotted in functions)
    for file, name in tests:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file} has no {name}"


def test_every_equation_and_weighting_has_a_row() -> None:
    table = "\n".join(ROWS)
    assert all(re.search(rf"^\| eq\. {number} ", table, re.MULTILINE) for number in range(1, 7))
    weightings = {name for name in vaopd.core.__all__ if hasattr(getattr(vaopd.core, name), "token_shares")} - {"Weighting"}
    assert len(weightings) >= 6
    assert all(f"`vaopd.core.weighting.{name}`" in table for name in weightings)
