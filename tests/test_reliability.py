"""docs/reliability.md names tests that exist, at the place it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_paper_map import TEST

ROOT = Path(__file__).parent.parent
ROWS = [
    line
    for line in (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| promise |")
]


@pytest.mark.parametrize("row", ROWS, ids=[row.split(" | ")[0].removeprefix("| ") for row in ROWS])
def test_a_promise_names_tests_that_exist(row: str) -> None:
    promise, bar, tests = row.strip("| ").split(" | ")
    assert promise
    assert bar
    named = TEST.findall(tests)
    assert named
    assert ", ".join(f"`{file}::{name}`" for file, name in named) == tests
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file} has no {name}"


def test_the_promises_are_there() -> None:
    assert len(ROWS) >= 19
