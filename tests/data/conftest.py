from __future__ import annotations

from pathlib import Path

import pytest
from small_processor import ImageOnlyProcessor, encoded, make_processor, noise


@pytest.fixture(scope="session")
def processor() -> ImageOnlyProcessor:
    return make_processor()


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    """`figure.png` in a data set's folder."""
    path = tmp_path / "figure.png"
    path.write_bytes(encoded(noise()))
    return path
