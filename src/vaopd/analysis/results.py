"""From a study's folders to its numbers: rows of `results.jsonl`, the choice of the learning rate, and the tables of `summary.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vaopd.analysis.cell import COST, DONE
from vaopd.analysis.matrix import Cell, Place, Rates, read_json
from vaopd.analysis.statistics import (
    holm,
    mean_interval,
    paired_differences,
    seed_means,
    sign_flip_p,
    smallest_p,
    student_means,
)
from vaopd.train.folder import read_rows

Row = dict[str, Any]
Pairs = dict[tuple[str, int], float]  # (student, seed) -> a value
FEWEST_STUDENTS = 3  # for an interval over students
STRATUM = ("regime", "teacher", "train_size")  # what a comparison holds fixed
# column of a row -> what its mean over seeds is called; all but the accuracy are described, not tested
MEANS = ("blind_degraded", "blind_removed", "va", "student_va", "effective_rollouts", "kl", "tokens", "seconds")


def cell_row(cell: Cell, levels: Sequence[float] = ()) -> Row:
    """A finished cell's row (docs/own_study.md).

    Args:
        levels: held-out accuracies; for each, when the cell first reached it.
    """
    config, run = cell.config, cell.config.run
    evaluation, measured = read_json(run / "eval.json"), read_json(run / DONE)
    entry = evaluation["models"]["trained"]
    metrics = read_rows(run / "metrics.jsonl")
    train = list({row["step"]: row for row in metrics if row["kind"] == "train"}.values())
    evals = list({row["step"]: row for row in metrics if row["kind"] == "eval"}.values())
    costs = {(row["kind"], row["step"]): row["cpu_seconds"] for row in read_rows(run / COST)}
    curve = [[row["step"], row["accuracy"], row["va"], row["kl"], _training_seconds(costs, row["step"])] for row in evals]
    effective = [row["effective_rollouts"] for row in train if row["effective_rollouts"] is not None]
    return {
        "kind": "cell",
        "phase": cell.phase,
        "name": cell.name,
        "method": str(cell.method),
        "numbers": cell.method.numbers,
        **_place_columns(cell.place, cell.student, cell.teacher),
        "seed": config.seed,
        "lr": config.optim.lr,
        "steps": train[-1]["step"] if train else 0,
        "questions": evaluation["questions"],
        "k": evaluation["k"],
        **_entry_columns(entry, measured.get("student_va")),
        "effective_rollouts": sum(effective) / len(effective) if effective else None,
        "kl": evals[-1]["kl"] if evals else None,
        "seconds": _training_seconds(costs, train[-1]["step"]) if train else 0.0,
        "seconds_total": round(sum(costs.values()), 3),
        "curve": curve,
        "reached": [{"level": level, **_first(curve, level)} for level in levels],
    }


def baseline_row(name: str, role: str, place: Place, student: str, teacher: str | None, entry: Mapping[str, Any]) -> Row:
    """The row of an untrained student or a teacher."""
    columns = _place_columns(place, student, teacher)
    sizes = {"questions": entry["questions"], "k": entry["k"]}
    return {"kind": "baseline", "name": name, "method": role, **columns, **sizes, **_entry_columns(entry, entry.get("student_va"))}


def _place_columns(place: Place, student: str, teacher: str | None) -> Row:
    return {"regime": place.regime, "student": student, "teacher": teacher, "train_size": place.train_size}


def _entry_columns(entry: Mapping[str, Any], student_va: float | None) -> Row:
    keys = ("accuracy", "se", "blind_degraded", "blind_removed", "va", "va_top10", "tokens", "truncated")
    return {key: entry.get(key) for key in keys} | {"student_va": student_va}


def _training_seconds(costs: Mapping[tuple[str, int], float], step: int) -> float:
    """CPU seconds of the training steps up to one, without evaluations."""
    return round(sum(seconds for (kind, at), seconds in costs.items() if kind == "train" and at <= step), 3)


def _first(curve: Sequence[Sequence[Any]], level: float) -> Row:
    """Step and CPU seconds of the first evaluation at or above the level; None where there is none."""
    found = next(((point[0], point[4]) for point in curve if point[1] is not None and point[1] >= level), (None, None))
    return dict(zip(("step", "seconds"), found, strict=True))


def choose_rates(rows: Iterable[Row]) -> list[Row]:
    """The learning rate of each regime and method, with all that was measured to choose it.

    The best mean accuracy over the development seeds on `data.eval`; of equal ones, the smallest rate.

    Args:
        rows: of the development cells.
    """
    found: dict[tuple[str | None, str], dict[float, dict[int, float]]] = {}
    for row in rows:
        found.setdefault((row["regime"], row["method"]), {}).setdefault(row["lr"], {})[row["seed"]] = row["accuracy"]
    chosen = []
    for (regime, method), by_rate in found.items():
        tried: list[Row] = [
            {"lr": rate, "accuracy": sum(seeds.values()) / len(seeds), "seeds": {str(seed): value for seed, value in seeds.items()}}
            for rate, seeds in sorted(by_rate.items())
        ]
        best = max(tried, key=lambda entry: (entry["accuracy"], -entry["lr"]))
        at_edge = len(tried) > 1 and best in (tried[0], tried[-1])
        chosen.append({"regime": regime, "method": method, "chosen": best["lr"], "at_edge": at_edge, "tried": tried})
    return chosen


def chosen_rates(selection: Sequence[Row]) -> Rates:
    """(regime, method) -> the chosen rate."""
    return {(row["regime"], row["method"]): row["chosen"] for row in selection}


def tables(rows: Sequence[Row], baseline: str) -> Row:
    """`means`, `comparisons`, `trends` and `settings` of summary.json: accuracies in [0, 1], differences in percentage points.

    Args:
        rows: of the comparison cells.
        baseline: the method that the others are compared with.
    """
    strata = _grouped(rows, STRATUM)
    means = [entry for stratum, members in strata.items() for entry in _means(dict(zip(STRATUM, stratum, strict=True)), members)]
    comparisons = [
        dict(zip(STRATUM, stratum, strict=True)) | _comparison(members, method, baseline)
        for stratum, members in strata.items()
        for method in dict.fromkeys(row["method"] for row in members)
        if method != baseline
    ]
    trends, settings = _trends(comparisons), _settings(rows)
    for family in (comparisons, trends, settings):
        for entry, adjusted in zip(family, holm([entry["p"] for entry in family]), strict=True):
            entry["holm"] = adjusted
    return {"baseline": baseline, "means": means, "comparisons": comparisons, "trends": trends, "settings": settings}


def of_whole_seeds(rows: Sequence[Row], cells: int) -> list[Row]:
    """The rows of those seeds that are finished everywhere: what can be compared before all are.

    Args:
        rows: of comparison cells.
        cells: how many there are for each seed.
    """
    finished = Counter(row["seed"] for row in rows)
    return [row for row in rows if finished[row["seed"]] == cells]


def _grouped(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _means(stratum: Row, rows: Sequence[Row]) -> list[Row]:
    """Per method a row over all students, and where there are several, one for each below it (`student` is set there)."""
    found = []
    for method, members in _grouped(rows, ["method"]).items():
        by_student = _grouped(members, ["student"])
        parts = [(None, members), *((student, own) for (student,), own in by_student.items())] if len(by_student) > 1 else [(None, members)]
        for student, own in parts:
            columns = {name: _mean([row[name] for row in own]) for name in MEANS}
            rates = sorted({row["lr"] for row in own})
            accuracy = asdict(mean_interval(seed_means(_by_pair(own, lambda row: row["accuracy"]))))
            found.append(
                {**stratum, "method": method[0], "student": student, "runs": len(own), "lr": rates, "accuracy": accuracy, **columns}
            )
    return found


def _comparison(rows: Sequence[Row], method: str, baseline: str) -> Row:
    """A method minus the baseline, paired by student and seed."""
    pairs = paired_differences(_points(rows, method), _points(rows, baseline))
    students = list(dict.fromkeys(student for student, _ in pairs))
    over_students = asdict(mean_interval(student_means(pairs))) if len(students) >= FEWEST_STUDENTS else None
    each = [{"student": s, **asdict(mean_interval([v for (own, _), v in pairs.items() if own == s]))} for s in students]
    return {
        "method": method,
        "baseline": baseline,
        **_tested(pairs),
        "pairs": [[student, seed, round(value, 6)] for (student, seed), value in pairs.items()],
        "over_students": over_students,
        "per_student": each if len(students) > 1 else [],
        "until_baseline": _until_baseline(rows, method, baseline),
    }


def _tested(pairs: Pairs) -> Row:
    """Of differences: the mean over seeds with its interval, and the sign-flip test."""
    by_seed = seed_means(pairs)
    return {"points": asdict(mean_interval(by_seed)), "p": sign_flip_p(by_seed), "smallest_p": smallest_p(len(by_seed))}


def _points(rows: Sequence[Row], method: str) -> Pairs:
    """Accuracies in percent."""
    return _by_pair([row for row in rows if row["method"] == method], lambda row: 100 * row["accuracy"])


def _by_pair(rows: Iterable[Row], value: Callable[[Row], float]) -> Pairs:
    return {(row["student"], row["seed"]): value(row) for row in rows}


def _until_baseline(rows: Sequence[Row], method: str, baseline: str) -> Row | None:
    """When the method's held-out accuracy first reached the last one of its paired baseline run; means over the pairs that did.

    The baseline's own first time is beside it: a curve that wanders reaches its last value before its end.
    """
    curves = {name: {(r["student"], r["seed"]): r["curve"] for r in rows if r["method"] == name} for name in (method, baseline)}
    reached, own = [], []
    for pair, curve in curves[method].items():
        ends = [point[1] for point in curves[baseline][pair] if point[1] is not None]
        if ends:
            own.append(_first(curves[baseline][pair], ends[-1]))
            reached.append(_first(curve, ends[-1]))
    if not own:
        return None
    known = [entry for entry in reached if entry["step"] is not None]
    times = {key: _mean([entry[key] for entry in known]) for key in ("step", "seconds")}
    return {"of": len(own), "reached": len(known), **times} | {
        f"baseline_{key}": _mean([e[key] for e in own]) for key in ("step", "seconds")
    }


def _trends(comparisons: Sequence[Row]) -> list[Row]:
    """Does a difference grow along the teachers, or with the data? Last value of the axis minus its first, paired by student and seed."""
    found = []
    for axis in ("teacher", "train_size"):
        others = [key for key in (*STRATUM, "method") if key != axis]
        for fixed, members in _grouped(comparisons, others).items():
            first, last = members[0], members[-1]
            if first[axis] != last[axis]:
                ends = {"axis": axis, "first": first[axis], "last": last[axis], "baseline": first["baseline"]}
                tested = _tested(paired_differences(_pairs(last), _pairs(first)))
                found.append({**dict(zip(others, fixed, strict=True)), axis: None, **ends, **tested})
    return found


def _settings(rows: Sequence[Row]) -> list[Row]:
    """One method in two settings: at each value of a regime, teacher or training size minus the first, paired by student and seed."""
    found = []
    for axis in STRATUM:
        others = [key for key in (*STRATUM, "method") if key != axis]
        for fixed, members in _grouped(rows, others).items():
            (first, control), *rest = _grouped(members, [axis]).items()
            for value, treated in rest:
                ends = {"axis": axis, "first": first[0], "last": value[0]}
                method = members[0]["method"]
                tested = _tested(paired_differences(_points(treated, method), _points(control, method)))
                found.append({**dict(zip(others, fixed, strict=True)), axis: None, **ends, **tested})
    return found


def _pairs(comparison: Row) -> Pairs:
    return {(student, seed): value for student, seed, value in comparison["pairs"]}


def _mean(values: Sequence[float | None]) -> float | None:
    """None as soon as one is missing: a mean over the others would be another thing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else None
