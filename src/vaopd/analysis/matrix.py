"""From a study's axes to its cells: pure, but for the data that `write_data` draws or copies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vaopd.config import DataConfig, MethodConfig, RunConfig, StudyConfig, WorldConfig, parse_config
from vaopd.data.sources import read_examples, write_examples
from vaopd.errors import ConfigError
from vaopd.train.folder import RunFolder
from vaopd.world.data import write_world

DEVELOPMENT, COMPARISON = "development", "comparison"
Rates = Mapping[tuple[str | None, str], float]  # (regime, method) -> learning rate


@dataclass(frozen=True)
class Place:
    """Where a cell stands on the axes that are not the method's; None: the study has no such axis."""

    regime: str | None
    student: str | None
    teacher: str | None
    train_size: int | None

    @property
    def parts(self) -> list[str]:
        """What the axes contribute to a folder's name."""
        size = None if self.train_size is None else f"n{self.train_size}"
        return [part for part in (self.regime, self.student, self.teacher, size) if part]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    phase: str  # DEVELOPMENT | COMPARISON
    place: Place
    config: RunConfig

    @property
    def method(self) -> MethodConfig:
        """What it learns by."""
        return self.config.method

    @property
    def student(self) -> str:
        """The student's name on its axis, or the model itself."""
        return self.place.student or self.config.student

    @property
    def teacher(self) -> str | None:
        """The teacher's, likewise."""
        return self.place.teacher or self.config.teacher


def places(study: StudyConfig) -> list[Place]:
    """Every combination of regime, student, teacher and training size."""
    axes = product(study.regimes or (None,), study.students or (None,), study.teachers or (None,), study.train_sizes or (None,))
    return [Place(*values) for values in axes]


def development_cells(study: StudyConfig) -> list[Cell]:
    """Every method that has several learning rates, at each of them on the development seeds, once for each regime: at the first student
    and teacher and the largest training size. They have no test set: what chooses the rate is the accuracy on `data.eval`.
    """
    size = max(study.train_sizes, default=None)
    found = []
    for place in places(study):
        if place == Place(place.regime, next(iter(study.students), None), next(iter(study.teachers), None), size):
            for (method, rate), seed in product(study.rates_to_try, study.development_seeds):
                name = "-".join([_plain(str(method)), *([place.regime] if place.regime else []), f"lr{rate:g}", f"seed{seed}"])
                found.append(_cell(study, f"{DEVELOPMENT}/{name}", DEVELOPMENT, place, method, seed, rate))
    return found


def comparison_cells(study: StudyConfig, rates: Rates) -> list[Cell]:
    """Every method and seed at every place, seed after seed: a study that is stopped is a smaller one with fewer seeds.

    Args:
        rates: the chosen learning rate of each regime and method that had a choice.
    """
    found = []
    for seed, place, method in product(study.seeds, places(study), study.methods):
        name = "-".join([_plain(str(method)), *place.parts, *([f"seed{seed}"] if len(study.seeds) > 1 else [])])
        only = next(iter(study.rates_of(method)), None)
        found.append(_cell(study, name, COMPARISON, place, method, seed, rates.get((place.regime, str(method)), only)))
    return found


def _cell(study: StudyConfig, name: str, phase: str, place: Place, method: MethodConfig, seed: int, rate: float | None) -> Cell:
    values = study.recipe_of(place.regime, place.student, place.teacher)
    data = data_of(study, place)
    values |= {"run": str(study.run / name), "method": method.model_dump(), "seed": seed}
    values["data"] = data.model_dump(mode="json", exclude={"test"} if phase == DEVELOPMENT else None)
    values["eval"] = {**values.get("eval", {}), "baselines": False}
    if study.keep == "numbers":
        values["eval"].setdefault("samples", 0)
        values.setdefault("trackers", [])
    if rate is not None:
        values["optim"] = {**values.get("optim", {}), "lr": rate}
    return Cell(name, phase, place, parse_config(values, where=f"cell {name}"))


def _plain(method: str) -> str:
    """A method with its numbers as a folder's name: `va_opd(tau=0.5)` -> `va_opd-tau=0.5`."""
    return "".join(c if c.isalnum() or c in "._=-" else "_" for c in method.replace("(", "-").replace(", ", "-").rstrip(")"))


def data_of(study: StudyConfig, place: Place) -> DataConfig:
    """Where a cell's data lies, or will lie after `write_data`."""
    if study.world is not None:
        folder = _world_folder(study, place.regime)
        data = DataConfig(**{name: folder / f"{name}.jsonl" for name in ("train", "eval", "test")})
    else:
        data = DataConfig.model_validate(study.recipe_of(place.regime, place.student, place.teacher)["data"])
        folder = study.run / ("data" if "data" not in _regime_recipe(study, place.regime) else f"data-{place.regime}")
    if place.train_size is None:
        return data
    shorter: dict[str, Any] = {"train": folder / f"train-{place.train_size}.jsonl"}
    if data.format or data.question:  # the first rows are written in the package's own format, so that all files have to be in it
        shorter |= {
            "format": None,
            "question": None,
            **{name: folder / f"{name}.jsonl" for name in ("eval", "test") if getattr(data, name)},
        }
    return data.model_copy(update=shorter)


def write_data(study: StudyConfig) -> None:
    """Each distinct world once, and the first rows of training sets, unless they are there.

    Raises:
        ConfigError: what is there was drawn from another world, or a training set has fewer rows than `train_sizes` asks for.
    """
    for regime in study.regimes or (None,):
        world = study.world_of(regime)
        if world is not None:
            _write_world(world, _world_folder(study, regime))
    for place in places(study):
        if place.train_size is not None:
            whole, part = data_of(study, Place(place.regime, place.student, place.teacher, None)), data_of(study, place)
            _write_first(whole, whole.train, part.train, place.train_size)
            for name in ("eval", "test"):
                if (target := getattr(part, name)) != (source := getattr(whole, name)):
                    _write_first(whole, source, target, None)


def _world_folder(study: StudyConfig, regime: str | None) -> Path:
    """`data` for the study's own world, `data-REGIME` for another, named after the first regime that has it."""
    world = study.world_of(regime)
    if world == study.world:
        return study.run / "data"
    first = next(name for name in study.regimes if study.world_of(name) == world)
    return study.run / f"data-{first}"


def _write_world(world: WorldConfig, folder: Path) -> None:
    values, record = world.model_dump(mode="json"), folder / "world.json"
    before = read_json(record)
    if changed := [
        f"{key} was {before[key]}, is {values[key]}" for key in values if before and before.get(key, values[key]) != values[key]
    ]:
        raise ConfigError(
            f"{folder} was drawn from another world: {'; '.join(changed)}. Delete the study's folder, or give another: --set run=FOLDER"
        )
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).write_json(record.name, values)
    write_world(world, folder)


def _write_first(data: DataConfig, source: Path, target: Path, rows: int | None) -> None:
    """The first rows, or all of them, in the package's own format."""
    if target.exists():
        return
    examples = read_examples(source, data.format, data.question)
    if rows is not None and len(examples) < rows:
        raise ConfigError(f"train_sizes asks for {rows} rows, but {source} has {len(examples)}. Ask for fewer")
    write_examples(examples[:rows], target.parent, target.stem)


def _regime_recipe(study: StudyConfig, regime: str | None) -> dict[str, Any]:
    return study.regimes[regime].recipe if regime else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
