"""Reading run and study folders (docs/run_folder.md): tolerant of what is missing or torn, silent about nothing.

Everything here may be incomplete (a run in progress, an interrupted one) or hostile (texts of models and data). A fault becomes a
note that the page shows; nothing read is ever executed, and no path leaves the run's folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vaopd.errors import DataError

RUN_FILES = ("config.yaml", "metrics.jsonl", "eval.json", "samples.jsonl")
KEPT_QUESTIONS = 60  # per evaluation: more than a page can hold, few enough to keep memory flat
CONFIG_BYTES = 20_000
HUGE = 1e30

Json = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The sampled questions of one evaluation: the first `KEPT_QUESTIONS` rows, and how many there were."""

    step: int
    rows: list[Json]
    total: int


@dataclass(frozen=True)
class Run:
    """What one run folder holds. Absent files are empty values plus a note."""

    name: str
    path: Path
    config: Json = field(default_factory=dict)
    config_text: str = ""
    train: list[Json] = field(default_factory=list)  # metrics rows of kind "train", by step, one per step
    evals: list[Json] = field(default_factory=list)  # metrics rows of kind "eval", likewise
    first: Evaluation | None = None  # the sampled questions of the first evaluation
    last: Evaluation | None = None  # of the last one; None if there is only one
    sampled_steps: int = 0  # evaluations that samples.jsonl holds
    result: Json = field(default_factory=dict)  # eval.json
    account: Json = field(default_factory=dict)  # data.json
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> dict[str, Json]:
        """The final evaluation by role: `student`, `trained`, `teacher`."""
        return records(self.result.get("models"))


def number(value: object) -> float | None:
    """A finite float, or None for everything else: null, NaN, text, booleans, and what no measurement gives (beyond `HUGE`)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -HUGE < value < HUGE else None


def records(value: object) -> dict[str, Json]:
    """The entries of a mapping that are non-empty mappings themselves; anything else counts as absent."""
    return {str(k): v for k, v in value.items() if isinstance(v, dict) and v} if isinstance(value, Mapping) else {}


def items(value: object) -> list[Any]:
    """A list, or an empty one for anything else."""
    return value if isinstance(value, list) else []


def parse(text: str) -> Any:
    """JSON, or None where it is torn, nested absurdly deep, or otherwise unreadable."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_text(path: Path, notes: list[str], *, limit: int | None = None) -> str:
    """The file's text, empty with a note when it is missing; bytes that are no UTF-8 become U+FFFD."""
    if not path.is_file():
        notes.append(f"{path.name} is not there (yet).")
        return ""
    raw = path.read_bytes()
    if limit and len(raw) > limit:
        notes.append(f"{path.name} has {len(raw):,} bytes; the first {limit:,} are shown.")
    return raw[:limit].decode("utf-8", errors="replace")


def read_lines(path: Path, notes: list[str]) -> Iterator[Json]:
    """The rows of a JSON-lines file. Unreadable lines are counted in a note; a torn last one is named as such."""
    if not path.is_file():
        notes.append(f"{path.name} is not there (yet).")
        return
    bad: list[int] = []
    torn = False
    with path.open(encoding="utf-8", errors="replace") as file:
        for i, line in enumerate(file, 1):
            row = parse(line)
            if isinstance(row, dict) and number(row.get("step")) is not None:
                yield row
            elif not line.endswith("\n"):
                torn = True
            elif line.strip():
                bad.append(i)
    if torn:
        notes.append(f"{path.name}: the last line is torn (the run was stopped while writing it) and left out.")
    if bad:
        where = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        notes.append(f"{path.name}: {len(bad)} unreadable line(s) left out (line {where}).")


def read_metrics(path: Path, notes: list[str]) -> tuple[list[Json], list[Json]]:
    """Training and evaluation rows by step. A step written twice (a resumed run) counts once, as written last."""
    rows: dict[tuple[str, int], Json] = {}
    repeated = 0
    for row in read_lines(path, notes):
        key = (str(row.get("kind")), int(row["step"]))
        repeated += key in rows
        rows[key] = row
    if repeated:
        notes.append(f"metrics.jsonl: {repeated} row(s) were written twice (the run was resumed); the later ones count.")
    ordered = sorted(rows.items(), key=lambda entry: entry[0][1])
    return [row for (kind, _), row in ordered if kind == "train"], [row for (kind, _), row in ordered if kind == "eval"]


def read_samples(path: Path, notes: list[str]) -> list[Evaluation]:
    """The first and the last evaluation, and an empty one for each evaluation between them."""
    found: dict[int, list[Json]] = {}
    totals: dict[int, int] = {}
    for row in read_lines(path, notes):
        step = int(row["step"])
        totals[step] = totals.get(step, 0) + 1
        kept = found.setdefault(step, [])
        if len(kept) < KEPT_QUESTIONS:
            kept.append(row)
        for between in sorted(found)[1:-1]:  # a long run has many evaluations: hold two at a time
            found[between] = []
    return [Evaluation(step, found[step], totals[step]) for step in sorted(found)]


def read_config(path: Path, notes: list[str]) -> tuple[Json, str]:
    """The resolved recipe, parsed and as text."""
    text = read_text(path, notes, limit=CONFIG_BYTES)
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        notes.append("config.yaml is not readable as YAML; its text is shown as it is.")
        parsed = None
    return (parsed if isinstance(parsed, dict) else {}), text


def read_result(path: Path, notes: list[str]) -> Json:
    """eval.json or summary.json."""
    text = read_text(path, notes)
    parsed = parse(text)
    if text and not isinstance(parsed, dict):
        notes.append(f"{path.name} is not readable as JSON and left out.")
    return parsed if isinstance(parsed, dict) else {}


def is_run(path: Path) -> bool:
    """Whether the folder holds any file that only a run writes."""
    return any((path / name).is_file() for name in RUN_FILES)


def read_run(path: Path, name: str | None = None) -> Run:
    """One run's folder. Raises `DataError` if it holds none of a run's files."""
    path = Path(path)
    if not is_run(path):
        raise DataError(f"{path} is not a run's folder: it has none of {', '.join(RUN_FILES)}. Give the folder that `vaopd train` wrote.")
    notes: list[str] = []
    config, config_text = read_config(path / "config.yaml", notes)
    train, evals = read_metrics(path / "metrics.jsonl", notes)
    sampled = read_samples(path / "samples.jsonl", notes)
    return Run(
        name=name or path.resolve().name,
        path=path,
        config=config,
        config_text=config_text,
        train=train,
        evals=evals,
        first=sampled[0] if sampled else None,
        last=sampled[-1] if len(sampled) > 1 else None,
        sampled_steps=len(sampled),
        result=read_result(path / "eval.json", notes),
        account=read_result(path / "data.json", notes),
        notes=tuple(notes),
    )


def find_cells(study: Path) -> list[Path]:
    """The run folders of a study, one or two levels down (`va_opd/`, `va_opd/seed_1/`), by name."""
    folders = [p for pattern in ("*", "*/*") for p in Path(study).glob(pattern) if p.is_dir()]
    return sorted(p for p in folders if is_run(p) and not is_run(p.parent))


def read_study(study: Path) -> tuple[list[Run], Json, list[str]]:
    """The cells of a study, its summary, and notes. Raises `DataError` if it has no cell."""
    cells = find_cells(study)
    if not cells:
        files = ", ".join(RUN_FILES)
        raise DataError(f"{study} holds neither a run ({files}) nor folders with runs. Give a folder that `vaopd train` wrote, or a study.")
    notes: list[str] = []
    summary = read_result(Path(study) / "summary.json", notes)
    return [read_run(cell, cell.relative_to(study).as_posix()) for cell in cells], summary, notes


def group_name(name: str) -> str:
    """The cell's name without its seed: runs of one group are repetitions of the same thing (`va_opd/seed_1` -> `va_opd`)."""
    return re.sub(r"[-_/.](?:s|seed)[-_]?\d+$", "", name) or name
