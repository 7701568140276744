"""Several seeds of one method: means over seeds, their intervals, and differences between methods paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vaopd.report.read import Json, Run, group_name, number

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, two-sided 95 %, 1 … 10 degrees of freedom


@dataclass(frozen=True)
class Group:
    """Runs that repeat the same thing with other seeds; usually one."""

    key: str
    label: str
    colour: int
    runs: tuple[Run, ...]


def t95(freedom: int) -> float:
    """Half width of a 95 % interval in standard errors; above 10 degrees of freedom a close upper bound."""
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.68 / freedom


def spread(values: Sequence[float]) -> float | None:
    """Standard error of the mean over seeds; None for one."""
    n = len(values)
    centre = sum(values) / n
    return (sum((v - centre) ** 2 for v in values) / (n - 1) / n) ** 0.5 if n > 1 else None


def interval(values: Sequence[float]) -> Json:
    """The mean of some percentage points over seeds with its 95 % t-interval, as a `gain`."""
    centre, se = sum(values) / len(values), spread(values)
    half = None if se is None else t95(len(values) - 1) * se
    return {"points": centre, "low": None if half is None else centre - half, "high": None if half is None else centre + half}


def mean_model(models: Sequence[Json]) -> Json:
    """The mean of every number that all seeds have; `se` is the standard error over seeds, `seeds` how many."""
    keys = [k for k in models[0] if k != "se" and all(number(m.get(k)) is not None for m in models)]
    accuracies = [a for m in models if (a := number(m.get("accuracy"))) is not None]
    means = {k: sum(float(m[k]) for m in models) / len(models) for k in keys}
    return means | {"se": spread(accuracies) if len(accuracies) == len(models) else None, "seeds": len(models)}


def with_means(models: Mapping[str, Json], groups: Sequence[Group]) -> dict[str, Json]:
    """Before the seeds of a group, their mean under the group's key; groups of one run stay as they are."""
    out: dict[str, Json] = {}
    several = {g.key: [r.name for r in g.runs if r.name in models] for g in groups if len(g.runs) > 1}
    for name, model in models.items():
        key = group_name(name)
        if key not in out and len(several.get(key, [])) > 1:
            out[key] = mean_model([models[n] for n in several[key]])
        out[name] = model
    return out


def mean_gains(gains: Mapping[str, Json], groups: Sequence[Group]) -> dict[str, Json]:
    """One gain per group: a single run's own, or the mean over seeds with its t-interval; then what belongs to no group."""
    out: dict[str, Json] = {}
    for group in groups:
        found = [gains[r.name] for r in group.runs if r.name in gains]
        points = [p for g in found if (p := number(g.get("points"))) is not None]
        if len(points) > 1:
            out[group.key] = interval(points)
        elif found:
            out[group.key] = found[0]
    members = {r.name for g in groups for r in g.runs}
    return out | {name: gain for name, gain in gains.items() if name not in members}


def differences(models: Mapping[str, Json], groups: Sequence[Group]) -> dict[str, Json]:
    """Accuracy minus that of plain OPD (else of the first group), paired by seed: mean with its t-interval, in percentage points."""
    by_seed = {
        g.key: {r.name.removeprefix(g.key): a for r in g.runs if (a := number(models.get(r.name, {}).get("accuracy"))) is not None}
        for g in groups
        if len(g.runs) > 1
    }
    labels = {g.key: g.label for g in groups}
    base = "opd" if "opd" in by_seed else next(iter(by_seed), "")
    out: dict[str, Json] = {}
    for key, accuracies in by_seed.items():
        both = [100 * (a - by_seed[base][seed]) for seed, a in accuracies.items() if seed in by_seed[base]]
        if key != base and len(both) > 1:
            out[f"{labels[key]} minus {labels[base]}, {len(both)} seeds paired"] = interval(both)
    return out
