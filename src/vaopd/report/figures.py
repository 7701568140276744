"""From runs to the page's plots and tables: which curve, which row, which unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vaopd.report.heat import clip, significant, visible
from vaopd.report.plots import Dot, Series, dot_plot, line_plot, mass_plot, short
from vaopd.report.read import Json, Run, group_name, items, number, records
from vaopd.report.seeds import Group, spread

LABELS = {
    "student": "student",
    "teacher": "teacher",
    "trained": "trained",
    "opd": "OPD",
    "va_opd": "VA-OPD",
    "sft": "SFT",
    "off_policy_kd": "off-policy KD",
    "rollout_only": "rollout weights only",
    "token_only": "token weights only",
    "random_tokens": "random tokens",
    "mask_tokens": "masked tokens",
}
OWN_COLOUR = {"opd": 0, "va_opd": 1}
COLOURS = 8


@dataclass(frozen=True)
class Curve:
    """A plot over training steps of one key of metrics.jsonl."""

    kind: str
    key: str
    title: str
    unit: str
    factor: float = 1.0
    zero: bool = True
    exact: bool = False  # set by a schedule, not measured: nothing to smooth


CURVES = (
    Curve("eval", "accuracy", "Held-out accuracy", "%, shaded ± standard error", 100, zero=False),
    Curve("eval", "va", "Visual advantage, held out", "nats per token"),
    Curve("train", "va", "Visual advantage, training", "nats per token"),
    Curve("train", "loss", "Loss", "nats (eq. 6)"),
    Curve("train", "kl", "KL to the teacher", "nats per token"),
    Curve("train", "va_top10", "Top 10 % of tokens", "% of the step's VA", 100, zero=False),
    Curve("train", "tokens", "Response length", "tokens"),
    Curve("train", "truncated", "Truncated rollouts", "%", 100),
    Curve("train", "effective_rollouts", "Effective rollouts", "1/Σ w², at most K"),
    Curve("train", "grad_norm", "Gradient norm", "before clipping"),
    Curve("train", "lr", "Learning rate", "of the step", exact=True),
    Curve("train", "seconds", "Time per step", "seconds"),
)


def method(run: Run) -> str:
    """The configured method's name: a word, or the name inside a mapping with its numbers."""
    value = run.config.get("method")
    if isinstance(value, dict):
        value = value.get("name", next(iter(value), None))
    return value if isinstance(value, str) else ""


def label(name: str) -> str:
    """A key as people write it; folder names and keys of files are foreign text."""
    base = group_name(name)
    if base in LABELS and base != name:
        return f"{LABELS[base]}, {visible(clip(name.removeprefix(base).strip('-_/.'), 40))}"
    return LABELS.get(name) or visible(clip(name, 60))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in order of appearance, coloured by method where that tells them apart."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(group_name(run.name), []).append(run)
    methods = [OWN_COLOUR.get(name, OWN_COLOUR.get(method(members[0]))) for name, members in found.items()]
    distinct = len({m for m in methods if m is not None}) == sum(m is not None for m in methods)
    free = iter([c for c in range(COLOURS) if not distinct or c not in methods] * len(found))
    colours = [m if m is not None and distinct else next(free) for m in methods]
    return [Group(name, label(name), c, tuple(members)) for (name, members), c in zip(found.items(), colours, strict=True)]


def series(group: Group, curve: Curve) -> Series:
    """The group's line: one run as it is, several as their mean with the standard error over seeds (steps that all of them have)."""
    rows = [{int(r["step"]): r for r in (run.evals if curve.kind == "eval" else run.train)} for run in group.runs]
    steps = sorted(set.intersection(*(set(r) for r in rows)))
    known = [[v for r in rows if (v := number(r[s].get(curve.key))) is not None] for s in steps]
    y = [curve.factor * sum(v) / len(v) if v else None for v in known]
    if len(rows) > 1:
        se = [spread(v) if v else None for v in known]
    else:
        se = [number(rows[0][s].get("se")) if curve.key == "accuracy" else None for s in steps]
    scaled = [None if v is None else v * curve.factor for v in se]
    return Series(group.label, [float(s) for s in steps], y, group.colour, scaled if any(v is not None for v in scaled) else ())


def last_values(lines: Sequence[Series]) -> str:
    """`at the end 0.21`, or each line's last value: what stands above a plot until the pointer asks for more."""
    ends = [(line.label, short(float(f"{line.known[-1]:.3g}"))) for line in lines if line.known]
    return " · ".join(value if len(lines) == 1 else f"{name} {value}" for name, value in ends) + " at the end"


def curves(groups: Sequence[Group]) -> tuple[list[tuple[Curve, str, str]], list[str]]:
    """The plots that have data with their last values, and the titles of those that have none."""
    drawn, absent = [], []
    for curve in CURVES:
        lines = [series(group, curve) for group in groups]
        slug = f"{curve.kind}-{curve.key}"
        svg = line_plot(lines, slug=slug, title=curve.title, unit=curve.unit, zero=curve.zero, dots=curve.kind == "eval", exact=curve.exact)
        if svg:
            drawn.append((curve, svg, last_values(lines)))
        else:
            absent.append(f"{curve.title} ({curve.kind}: {curve.key})")
    return drawn, absent


def percent(value: object) -> str:
    """A share as a percentage with one decimal: 0.418 -> `41.8`."""
    known = number(value)
    return "–" if known is None else f"{100 * known:.1f}".replace("-", "−")


def nats(value: object) -> str:
    """Nats with three decimals, two from 1 on, two digits below 0.01: 0.07 -> `0.070`, 0.00077 -> `0.00077`."""
    known = number(value)
    if known is not None and 0 < abs(known) < 0.01:
        return significant(known, 2)
    return "–" if known is None else f"{known:.{3 if abs(known) < 1 else 2}f}".replace("-", "−")


def accuracy(model: Json) -> str:
    """`41.8 ± 1.9`, in percent."""
    se = number(model.get("se"))
    return percent(model.get("accuracy")) + ("" if se is None else f" ± {percent(se)}")


def gain_text(gain: Json) -> str:
    """`+29.1 [25.0, 33.2]`, in percentage points with the 95 % interval."""
    points, low, high = (number(gain.get(k)) for k in ("points", "low", "high"))
    if points is None:
        return "–"
    interval = f" [{low:.1f}, {high:.1f}]" if low is not None and high is not None else ""
    return f"{points:+.1f}{interval}".replace("-", "−")


def includes_zero(gain: Json) -> bool | None:
    """Whether the interval leaves the sign open; None without an interval."""
    low, high = number(gain.get("low")), number(gain.get("high"))
    return None if low is None or high is None else low <= 0 <= high


def verdict(gain: Json) -> str:
    """The interval and what it says, in words."""
    if includes_zero(gain) is None:
        return "no interval was computed"
    interval = gain_text(gain).partition(" ")[2]
    return f"95 % interval {interval}" + (": includes zero, no difference is shown" if includes_zero(gain) else "")


def closed(models: Mapping[str, Json], name: str) -> float | None:
    """The share of the distance from student to teacher that training covered; None without a better teacher."""
    student, trained, teacher = (number(models.get(k, {}).get("accuracy")) for k in ("student", name, "teacher"))
    if student is None or trained is None or teacher is None or teacher <= student:
        return None
    return (trained - student) / (teacher - student)


def model_rows(models: Mapping[str, Json], gains: Mapping[str, Json], colours: Mapping[str, str]) -> list[Json]:
    """The table of models: one row each, values formatted."""
    return [
        {
            "name": label(name) + (f", mean of {m['seeds']} seeds" if "seeds" in m else ""),
            "part": bool(group_name(name) != name and group_name(name) in models),
            "colour": colours.get(name, "ink"),
            "accuracy": accuracy(m),
            "gain": gain_text(gains.get(name, {})),
            "closed": percent(closed(models, name) if name in gains else None),
            "blind_degraded": percent(m.get("blind_degraded")),
            "blind_removed": percent(m.get("blind_removed")),
            "va": nats(m.get("va")),
            "va_top10": percent(m.get("va_top10")),
            "tokens": "–" if number(m.get("tokens")) is None else f"{m['tokens']:.1f}",
            "truncated": percent(m.get("truncated")),
        }
        for name, m in models.items()
    ]


def accuracy_plot(models: Mapping[str, Json], colours: Mapping[str, str]) -> str:
    """Accuracy ± se of each model, hollow marks for its accuracy without the picture."""
    rows = []
    for name, model in models.items():
        value = number(model.get("accuracy"))
        if value is None or (group_name(name) != name and group_name(name) in models):
            continue  # a seed: its method's mean is drawn
        se = number(model.get("se")) or 0.0
        blind = tuple(100 * v for k in ("blind_degraded", "blind_removed") if (v := number(model.get(k))) is not None)
        rows.append(Dot(label(name), 100 * value, 100 * (value - se), 100 * (value + se), accuracy(model), colours.get(name, "ink"), blind))
    return dot_plot(rows, slug="accuracy", title="Accuracy of each model", unit="percent", low=0, high=100)


def forest_plot(gains: Mapping[str, Json], colours: Mapping[str, str]) -> str:
    """Gains over the student with their 95 % intervals, around zero."""
    rows = []
    for name, gain in gains.items():
        points, low, high = (number(gain.get(k)) for k in ("points", "low", "high"))
        if points is not None:
            ends = (points if low is None else low, points if high is None else high)
            rows.append(Dot(label(name), points, *ends, gain_text(gain), colours.get(name, "ink")))
    places = [0.0, *(r.low for r in rows), *(r.high for r in rows)]
    pad = 0.08 * (max(places) - min(places)) or 1.0
    unit = "percentage points, 95 % interval"
    return dot_plot(rows, slug="gains", title="Gain over the student", unit=unit, low=min(places) - pad, high=max(places) + pad)


def mass_figure(curve: object) -> str:
    """The mass curve of eval.json or summary.json; empty when it is missing or malformed."""
    if not isinstance(curve, dict):
        return ""
    pairs = []
    for a, b in zip(items(curve.get("tokens")), items(curve.get("mass")), strict=False):
        x, y = number(a), number(b)
        if x is not None and y is not None and 0 <= x <= 1 and 0 <= y <= 1:
            pairs.append((100 * x, 100 * y))
    thin = pairs[:: max(1, len(pairs) // 400)] + pairs[-1:]
    return mass_plot([x for x, _ in thin], [y for _, y in thin])


def total(rows: Sequence[Json], name: str) -> float:
    """Sum over the steps that know it."""
    return sum(v for r in rows if (v := number(r.get(name))) is not None)


def duration(seconds: float) -> str:
    """`4 min 12 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def health(run: Run) -> Json:
    """What the metrics say about the run itself; a flagged value deserves a look."""
    rows = run.train
    bad = [int(r["step"]) for r in rows if number(r.get("nonfinite"))]
    seconds, truncated = total(rows, "seconds"), [v for r in rows if (v := number(r.get("truncated"))) is not None]
    where = f" (step {', '.join(map(str, bad[:4]))}{', …' if len(bad) > 4 else ''})" if bad else ""
    last = int(rows[-1]["step"]) if rows else 0
    share = sum(truncated) / len(truncated) if truncated else None
    used, lost = rows_used(run.account)
    return {
        "name": label(run.name),
        "rows": (used, bool(lost)),
        "lost": lost,
        "steps": (f"{last:,}" + ("" if len(rows) >= last else f" ({last - len(rows)} not recorded)"), len(rows) < last),
        "nonfinite": (f"{len(bad)}{where}", bool(bad)),
        "empty": (f"{total(rows, 'empty'):,.0f}", total(rows, "empty") > 0),
        "skipped": (f"{total(rows, 'skipped_prompts'):,.0f}", total(rows, "skipped_prompts") > 0),
        "truncated": (percent(share) + ("" if share is None else " %"), (share or 0) > 0.1),
        "time": (f"{duration(seconds)}" + (f", {seconds / len(rows):.2g} s a step" if rows else ""), False),
    }


def rows_used(account: Json) -> tuple[str, list[str]]:
    """How many rows of the data files were used, and for which reasons the others were not, from data.json."""
    files = records(account.get("files"))
    rows, used = (sum(number(entry.get(key)) or 0 for entry in files.values()) for key in ("rows", "used"))
    named = [(visible(clip(name, 60)), *skip) for name, file in files.items() for skip in skips(file)]
    lost = [f"{name}: {number(count) or 0:,.0f} × {visible(clip(reason, 200))}" for name, reason, count in named]
    if left_out := number(account.get("left_out")):
        lost.append(f"train: {left_out:,.0f} × asks a held-out question with the same pictures")
    return (f"{used:,.0f} of {rows:,.0f}" if files else "–"), lost


def skips(file: Json) -> list[tuple[str, object]]:
    """Reason and rows of what was skipped in one data file."""
    found = file.get("skipped")
    return [(str(reason), count) for reason, count in found.items()] if isinstance(found, dict) else []


def all_models(runs: Sequence[Run], summary: Json) -> dict[str, Json]:
    """Student, each run, teacher: from the study's summary, else from the runs' own evaluations (one student if all agree on it)."""
    if records(summary.get("models")):
        return records(summary["models"])
    out: dict[str, Json] = {}
    for role in ("student", "trained", "teacher"):
        known = [(run, run.models[role]) for run in runs if role in run.models]
        if role != "trained" and known and all(model == known[0][1] for _, model in known):
            out[role] = known[0][1]
        else:
            out |= {run.name if role == "trained" else f"{role} of {label(run.name)}": model for run, model in known}
    return out
