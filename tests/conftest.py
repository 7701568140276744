from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from small_pair import Pair, make_config, make_pair, mixed_examples, write_data
from vaopd.config import RunConfig
from vaopd.types import Prompt


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def _the_pair_is_left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests share one student: one that freezes it would fail others, in an order that depends on the machine."""
    yield
    if "pair" in request.fixturenames:
        student = request.getfixturevalue("pair").student
        assert all(parameter.requires_grad for parameter in student.parameters()), "this test froze the shared student"


@pytest.fixture(scope="session")
def prompts(pair: Pair) -> list[Prompt]:
    """Prompts of different grids, with two images, with one and with none."""
    return [pair.renderer(example) for example in mixed_examples()]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(tmp_path: Path, pair: Pair, data: dict[str, str]) -> Callable[..., RunConfig]:
    """Makes the configuration of a short run in `tmp_path/run`."""

    def make(**changes: Any) -> RunConfig:
        return make_config(tmp_path / "run", pair, data, **changes)

    return make
