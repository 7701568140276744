"""The run folder: what `docs/run_folder.md` describes, written line by line as the run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from vaopd.config import RunConfig, load_config
from vaopd.data.images import content_hash
from vaopd.errors import CheckpointError
from vaopd.files import claimed, replace_text

RECIPE, ACCOUNT = "config.yaml", "data.json"
# What only decides how a result is computed or kept. The folder may have moved.
MAY_CHANGE = (
    "run",
    "trackers",
    "checkpoint.",
    "rollouts.rows",
    "rollouts.url",
    "optim.tokens_per_forward",
    "optim.checkpointing",
    "teacher_offload",
)
LARGEST_SIDE = 448  # pixels of a stored sample picture


class RunFolder:
    """Paths of one run and its writers.

    Args:
        writes: False: nothing is written; of several processes that train together, one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.metrics, self.samples, self.checkpoints = path / "metrics.jsonl", path / "samples.jsonl", path / "checkpoints"

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Refuse to start over a run that is there, to resume one that is not, or to resume one with another recipe.

        Raises:
            CheckpointError: names what differs, or what to do.
        """
        there = self.metrics.exists() or self.checkpoints.exists() or (self.path / RECIPE).exists()
        if there and not resume:
            raise CheckpointError(
                f"there is a run in {self.path} already. Go on with it by --resume, or give another folder: --set run=FOLDER"
            )
        if resume and not there:
            raise CheckpointError(f"there is no run to resume in {self.path}. Start it without --resume")
        if changed := self.changed(config):
            raise CheckpointError(
                f"the run in {self.path} was started with another recipe: {'; '.join(changed)}. "
                "A resumed run goes on as it was: put the recipe back, or start another run: --set run=FOLDER"
            )

    def changed(self, config: RunConfig) -> list[str]:
        """`key: was, now` for every value that the folder's recipe has otherwise and that a result depends on."""
        path = self.path / RECIPE
        if not path.exists():
            return []
        before, now = (_flat(recipe.model_dump(mode="json")) for recipe in (load_config(path), config))
        keys = [key for key in sorted(before.keys() | now.keys()) if not key.startswith(MAY_CHANGE)]
        return [f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys if before.get(key) != now.get(key)]

    def start(self, config_yaml: str) -> None:
        """Create the folder and write the resolved recipe."""
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_text(RECIPE, config_yaml)

    def claimed(self) -> AbstractContextManager[None]:
        """Inside, no other run on this machine writes to the folder (`files.claimed`). Raises CheckpointError: another process has it."""
        return claimed(self.path, "--set run=FOLDER") if self.writes else nullcontext()

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run writes them again."""
        for file in (self.metrics, self.samples):
            if file.exists():
                kept = [line for line in _lines(file) if _step_of(line) <= step]
                self.write_text(file.name, "".join(f"{line}\n" for line in kept))

    def append(self, file: Path, row: Mapping[str, Any]) -> None:
        """One JSON row; numbers that are not finite become null, since JSON has no name for them."""
        if not self.writes:
            return
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A whole JSON file, replaced atomically."""
        self.write_text(name, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A whole text file, replaced atomically."""
        if self.writes:
            replace_text(self.path / name, text)

    def picture(self, image: Image.Image) -> str:
        """Store a picture once, under its content; returns its path relative to the folder."""
        name = f"samples/{content_hash(image)[:16]}.png"
        target = self.path / name
        if self.writes and not target.exists():
            target.parent.mkdir(exist_ok=True)
            small = image.copy()
            small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            small.save(target)
        return name


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b.c` -> value."""
    if not isinstance(values, Mapping):
        return {prefix.rstrip("."): values}
    return {key: value for name, item in values.items() for key, value in _flat(item, f"{prefix}{name}.").items()}


def read_rows(file: Path, keep: Callable[[Mapping[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a torn last line (a kill while writing) is left out."""
    if not file.exists():
        return []
    return [row for line in _lines(file) if (row := _parsed(line)) is not None and keep(row)]


def _lines(file: Path) -> list[str]:
    # Not splitlines(), which also splits at U+2028 and the like inside a text; a kill may have cut a character in two.
    return file.read_text(encoding="utf-8", errors="replace").split("\n")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: str) -> float:
    row = _parsed(line)
    return math.inf if row is None else row.get("step", math.inf)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
