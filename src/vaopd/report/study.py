"""The page of a study with seeds or axes: paired differences, means, curves; from `summary.json` and `results.jsonl` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vaopd.report import figures
from vaopd.report.heat import clip, scale_css
from vaopd.report.page import PAGE_BYTES, TEMPLATES, digest, environment, flatten, save
from vaopd.report.plots import Dot, Series, dot_plot, line_plot, trail_plot
from vaopd.report.read import Json, items, number, parse, read_result, read_text
from vaopd.report.seeds import spread

SUMMARY, ROWS = "summary.json", "results.jsonl"
MOST_STRATA, MOST_DIFFERENCES, MOST_CELLS = 36, 80, 1500
STRATUM = ("regime", "teacher", "train_size")
COLUMNS = ("blind_degraded", "blind_removed")  # shares
NATS = ("va", "student_va", "kl")


@dataclass(frozen=True)
class Study:
    """What the two files hold; everything in them is foreign."""

    summary: Json
    rows: list[Json]
    notes: list[str]

    def listed(self, name: str) -> list[Json]:
        """The entries of a list of the summary that are mappings."""
        return [entry for entry in items(self.summary.get(name)) if isinstance(entry, dict)]

    @property
    def cells(self) -> list[Json]:
        """Rows of the comparison."""
        return [row for row in self.rows if row.get("kind") == "cell" and row.get("phase") == "comparison"]

    @property
    def methods(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(str(row.get("method")) for row in self.cells))

    @property
    def varied(self) -> set[str]:
        """Which columns of a place say something: those with more than one value."""
        return {key for key in (*STRATUM, "student") if len({str(row.get(key)) for row in self.cells}) > 1}


def is_study(folder: Path) -> bool:
    """Whether the folder's summary compares methods over seeds or axes."""
    path = folder / SUMMARY
    found = parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    return isinstance(found, dict) and "comparisons" in found


def read(folder: Path) -> Study:
    """Both files, tolerant of what is missing or torn."""
    notes: list[str] = []
    summary = read_result(folder / SUMMARY, notes)
    lines = read_text(folder / ROWS, notes).split("\n")
    rows = [row for line in lines if isinstance(row := parse(line), dict)]
    if bad := sum(bool(line.strip()) for line in lines) - len(rows):
        notes.append(f"{ROWS}: {bad} unreadable line(s) left out.")
    return Study(summary, rows, notes)


def write_study(folder: Path, out: Path) -> Path:
    """Write the page of a study's folder; returns where."""
    return save(study_page(read(folder), folder.resolve().name), out)


def study_page(study: Study, name: str) -> str:
    """The HTML, at most `PAGE_BYTES` long: the list of all cells goes first where it would be longer, then plots."""
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8") + scale_css()
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    policy = f"default-src 'none'; img-src data:; style-src {digest(css)}; script-src {digest(script)}; base-uri 'none'; form-action 'none'"
    template = environment().get_template("study.html")
    fixed = {"css": Markup(css), "script": Markup(script), "policy": Markup(policy)}
    page = ""
    for cells, strata in ((MOST_CELLS, MOST_STRATA), (0, MOST_STRATA), (0, 6)):
        page = template.render(**context(study, name, cells, strata), **fixed)
        if len(page.encode()) <= PAGE_BYTES:
            break
    return page


def context(study: Study, name: str, most_cells: int, most_strata: int) -> Json:
    """All that the template reads."""
    summary, varied = study.summary, study.varied
    colours = method_colours(study.methods)
    strata = strata_of(study.cells)
    axes = records_of(summary.get("study"))
    made_with = records_of(summary.get("versions"))
    settings = axes | ({"versions": made_with} if made_with else {})
    seconds = number(summary.get("cpu_seconds"))
    comparisons, trends, in_settings = (study.listed(name) for name in ("comparisons", "trends", "settings"))
    limits = [p for entry in (*comparisons, *trends, *in_settings) if (p := number(entry.get("smallest_p"))) is not None]
    return {
        "title": clip(summary.get("name") or name, 80),
        "notes": [*study.notes, *unfinished(summary)],
        "facts": facts(study, axes),
        "seconds": figures.duration(seconds) if seconds is not None else "",
        "k": f"{number(summary.get('k')) or 0:.0f}" if number(summary.get("k")) else "k",
        "baseline": method_label(str(summary.get("baseline", ""))),
        "methods": [(method_label(method), colours[method]) for method in study.methods],
        "differences": Markup(differences_plot(comparisons, colours, varied)),
        "comparisons": [difference_row(entry, colours, varied) for entry in comparisons],
        "hidden_differences": max(0, len(comparisons) - MOST_DIFFERENCES),
        "trends": [difference_row(entry, colours, varied) for entry in trends],
        "in_settings": [difference_row(entry, colours, varied) for entry in in_settings],
        "smallest_p": significance(max(limits, default=None)),
        "several_students": any(entry.get("per_student") for entry in comparisons),
        "means": mean_rows(study, colours, varied),
        "figures": [stratum_figures(place, rows, colours, varied, i) for i, (place, rows) in enumerate(list(strata.items())[:most_strata])],
        "hidden_strata": max(0, len(strata) - most_strata),
        "until": [row for entry in comparisons if (row := until_row(entry, colours, varied))],
        "selection": [selection_row(entry) for entry in study.listed("selection")],
        "cells": [cell_row(row) for row in study.rows if row.get("kind") == "cell"][:most_cells],
        "hidden_cells": max(0, sum(row.get("kind") == "cell" for row in study.rows) - most_cells),
        "settings": list(flatten(settings).items())[:120],
    }


def unfinished(summary: Json) -> list[str]:
    """That the study goes on, if it does."""
    found = records_of(summary.get("unfinished"))
    if (done := number(found.get("seeds"))) is None or (of := number(found.get("of"))) is None:
        return []
    return [
        f"The study is not finished: differences and means are of the {done:.0f} of {of:.0f} seeds that are finished everywhere, "
        "curves and the list of runs of all runs that are done. Whoever stops a study when it looks right finds more than there is."
    ]


def facts(study: Study, axes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was varied, counted."""
    development = sum(row.get("phase") == "development" for row in study.rows)
    cells = f"{len(study.cells):,}" + (f" and {development} of development" if development else "")
    names = {"students": "students", "teachers": "teachers", "data sizes": "train_sizes", "regimes": "regimes"}
    sized = {key: len(axes[name]) for key, name in names.items() if isinstance(axes.get(name), list | dict)}
    counts = [(key, size) for key, size in sized.items() if size > 1]
    questions, k = number(study.summary.get("questions")), number(study.summary.get("k"))
    held_out = [] if questions is None or k is None else [("held out", f"{questions:,.0f} questions, {k:.0f} answers each")]
    return [("runs", cells), ("seeds", str(len(items(axes.get("seeds"))))), *((key, str(n)) for key, n in counts), *held_out]


def method_label(method: str) -> str:
    """`va_opd(tau=0.5)` -> `VA-OPD (tau=0.5)`."""
    base, bracket, numbers = method.partition("(")
    return figures.label(base) + (f" ({clip(numbers.rstrip(')'), 60)})" if bracket else "")


def method_colours(methods: Sequence[str]) -> dict[str, int]:
    """OPD and VA-OPD in their own colours, the others in what is left."""
    own = {method: figures.OWN_COLOUR[method] for method in methods if method in figures.OWN_COLOUR}
    free = [c for c in range(figures.COLOURS) if c not in own.values()] or [0]
    others = (method for method in methods if method not in own)
    return own | {method: free[i % len(free)] for i, method in enumerate(others)}


def place_words(row: Json, varied: set[str]) -> str:
    """Where a row stands on the axes that vary."""
    size = number(row.get("train_size"))
    words = [row.get(key) for key in ("regime", "teacher") if key in varied] + (
        [f"{size:,.0f} rows"] if "train_size" in varied and size else []
    )
    return " · ".join(clip(word, 40) for word in words if word)


def row_words(entry: Json, varied: set[str]) -> str:
    """Method and place; a trend says from where to where."""
    words = [method_label(str(entry.get("method"))), place_words(entry, varied)]
    if "axis" in entry:
        words.append(
            f"{clip(entry.get('axis'), 20).replace('_', ' ')} {clip(entry.get('last'), 30)} against {clip(entry.get('first'), 30)}"
        )
    return ", ".join(word for word in words if word)


def points_of(entry: object) -> Json:
    """An estimate as a gain: `points`, `low`, `high`."""
    found = records_of(entry)
    return {"points": number(found.get("mean")), "low": number(found.get("low")), "high": number(found.get("high"))}


def significance(value: float | None) -> str:
    """A p-value with two digits."""
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def difference_row(entry: Json, colours: Mapping[str, int], varied: set[str]) -> Json:
    """A line of the table of differences, with those of single students below it."""
    students = [s for s in items(entry.get("per_student")) if isinstance(s, dict)]
    return {
        "name": row_words(entry, varied),
        "colour": colours.get(str(entry.get("method")), 0),
        "points": figures.gain_text(points_of(entry.get("points"))),
        "units": f"{number(records_of(entry.get('points')).get('n')) or 0:.0f}",
        "over_students": figures.gain_text(points_of(entry.get("over_students"))).partition(" ")[2] or "–",
        "p": significance(number(entry.get("p"))),
        "holm": significance(number(entry.get("holm"))),
        "students": [(clip(s.get("student"), 40), figures.gain_text(points_of(s)), f"{number(s.get('n')) or 0:.0f}") for s in students],
    }


def differences_plot(comparisons: Sequence[Json], colours: Mapping[str, int], varied: set[str]) -> str:
    """A row for each comparison: hollow marks for the pairs, the mean with its interval."""
    rows = []
    for entry in comparisons[:MOST_DIFFERENCES]:
        gain = points_of(entry.get("points"))
        if gain["points"] is None:
            continue
        pairs = tuple(v for pair in items(entry.get("pairs")) if isinstance(pair, list) and pair and (v := number(pair[-1])) is not None)
        low, high = (gain["points"] if gain[end] is None else gain[end] for end in ("low", "high"))
        colour = f"c{colours.get(str(entry.get('method')), 0)}"
        rows.append(Dot(row_words(entry, varied), gain["points"], low, high, figures.gain_text(gain), colour, pairs))
    places = [0.0, *(v for row in rows for v in (row.low, row.high, *row.hollow))]
    pad = 0.08 * (max(places) - min(places)) or 1.0
    # An interval from two seeds can be many times as wide as the differences; it ends at the border then, and its numbers are beside it.
    values = [0.0, *(v for row in rows for v in (row.value, *row.hollow))]
    reach = 2 * (max(values) - min(values)) or 1.0
    low, high = max(min(places), min(values) - reach) - pad, min(max(places), max(values) + reach) + pad
    return dot_plot(rows, slug="differences", title="Paired differences", unit="percentage points, 95 % interval", low=low, high=high)


def strata_of(rows: Sequence[Json]) -> dict[tuple[str, ...], list[Json]]:
    """Rows by regime, teacher and training size."""
    found: dict[tuple[str, ...], list[Json]] = {}
    for row in rows:
        found.setdefault(tuple(str(row.get(key)) for key in STRATUM), []).append(row)
    return found


def mean_rows(study: Study, colours: Mapping[str, int], varied: set[str]) -> list[Json]:
    """For each stratum: the untrained students, every method, the teacher."""
    found: list[Json] = []
    baselines = [row for row in study.rows if row.get("kind") == "baseline"]
    for _, means in strata_of(study.listed("means")).items():
        place = means[0]
        here = [row for row in baselines if row.get("regime") == place.get("regime")]
        students = [row for row in here if row.get("method") == "student"]
        teachers = [row for row in here if row.get("method") == "teacher" and row.get("teacher") == place.get("teacher")]
        heading = place_words(place, varied)
        found.append({"heading": heading or "all cells", "rows": [
            *(baseline_cells(row, "student" in varied) for row in students),
            *(mean_cells(row, colours) for row in means),
            *(baseline_cells(row, False) for row in teachers),
        ]})  # fmt: skip
    return found


def mean_cells(row: Json, colours: Mapping[str, int]) -> Json:
    """A method's means over its runs."""
    student = row.get("student")
    estimate = records_of(row.get("accuracy"))
    low, high = number(estimate.get("low")), number(estimate.get("high"))
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]".replace("-", "−")
    rates = [value for rate in items(row.get("lr")) if (value := number(rate)) is not None]
    return {
        "name": clip(student, 40) if student else method_label(str(row.get("method"))),
        "part": bool(student),
        "colour": f"c{colours.get(str(row.get('method')), 0)}",
        "runs": f"{number(row.get('runs')) or 0:.0f}",
        "accuracy": figures.percent(estimate.get("mean")) + interval,
        **measured(row),
        "effective": "–" if number(row.get("effective_rollouts")) is None else f"{row['effective_rollouts']:.2f}",
        "rate": ", ".join(f"{rate:g}" for rate in rates),
    }


def baseline_cells(row: Json, named: bool) -> Json:
    """An untrained model's numbers."""
    role = str(row.get("method"))
    name = f"{role} {clip(row.get('student'), 40)}" if named else role
    measures = {"runs": "–", "accuracy": figures.accuracy(row), **measured(row), "effective": "–", "rate": "–"}
    return {"name": name, "part": False, "colour": "grey" if role == "student" else "ink", **measures}


def measured(row: Json) -> Json:
    """The columns that rows of models and of means share."""
    shares = {key: figures.percent(row.get(key)) for key in COLUMNS}
    tokens, seconds = number(row.get("tokens")), number(row.get("seconds"))
    rest = {"tokens": "–" if tokens is None else f"{tokens:.1f}", "seconds": "–" if seconds is None else f"{seconds:,.0f}"}
    return shares | {key: figures.nats(row.get(key)) for key in NATS} | rest


def stratum_figures(place: tuple[str, ...], rows: Sequence[Json], colours: Mapping[str, int], varied: set[str], index: int) -> Json:
    """Held-out accuracy by step, and against the mean advantage, for one stratum."""
    curves = {method: mean_curve([r for r in rows if str(r.get("method")) == method]) for method in colours}
    lines = [
        Series(method_label(m), [p[0] for p in curve], [p[1] for p in curve], colours[m], [p[2] for p in curve])
        for m, curve in curves.items()
        if curve
    ]
    trails = [
        Series(method_label(m), [va for va, _ in known], [accuracy for _, accuracy in known], colours[m])
        for m, curve in curves.items()
        if (known := [(va, accuracy) for _, accuracy, _, va in curve if va is not None])
    ]
    title, unit = "Held-out accuracy", "%, shaded ± standard error over seeds"
    against, x_name = "Held-out accuracy against mean VA", "mean VA, nats per token"
    return {
        "place": place_words(rows[0], varied),
        "last": figures.last_values(lines),
        "accuracy": Markup(line_plot(lines, slug=f"accuracy-{index}", title=title, unit=unit, zero=False, dots=True)),
        "trail": Markup(trail_plot(trails, slug=f"trail-{index}", title=against, x_name=x_name)),
    }


def mean_curve(rows: Sequence[Json]) -> list[tuple[float, float, float | None, float | None]]:
    """(step, mean accuracy in percent, its standard error over seeds, mean VA) at the steps that all of these runs have."""
    by_run = [(row.get("seed"), curve_of(row)) for row in rows]
    by_run = [(seed, curve) for seed, curve in by_run if curve]
    if not by_run:
        return []
    points = []
    for step in sorted(set.intersection(*(set(curve) for _, curve in by_run))):
        seeds: dict[Any, list[float]] = {}
        for seed, curve in by_run:
            seeds.setdefault(seed, []).append(100 * curve[step][0])
        means = [sum(values) / len(values) for values in seeds.values()]
        va = [v for _, curve in by_run if (v := curve[step][1]) is not None]
        points.append((step, sum(means) / len(means), spread(means), sum(va) / len(va) if len(va) == len(by_run) else None))
    return points


def curve_of(row: Json) -> dict[float, tuple[float, float | None]]:
    """step -> (accuracy, mean VA) of one run."""
    found = {}
    for point in items(row.get("curve")):
        if isinstance(point, list) and len(point) >= 3:
            step, accuracy, va = (number(value) for value in point[:3])
            if step is not None and accuracy is not None:
                found[step] = (accuracy, va)
    return found


def until_row(entry: Json, colours: Mapping[str, int], varied: set[str]) -> Json | None:
    """When a method reached the baseline's last held-out accuracy."""
    found = entry.get("until_baseline")
    if not isinstance(found, dict):
        return None
    times = {key: number(found.get(key)) for key in ("of", "reached", "step", "seconds", "baseline_step", "baseline_seconds")}
    texts = {key: "–" if value is None else f"{value:,.0f}" for key, value in times.items()}
    return {"name": row_words(entry, varied), "colour": colours.get(str(entry.get("method")), 0), **texts}


def selection_row(entry: Json) -> Json:
    """How a method's learning rate was chosen."""
    tried = [t for t in items(entry.get("tried")) if isinstance(t, dict)]
    words = (method_label(str(entry.get("method"))), clip(entry.get("regime") or "", 40))
    return {
        "name": ", ".join(word for word in words if word),
        "chosen": "–" if (rate := number(entry.get("chosen"))) is None else f"{rate:g}",
        "at_edge": entry.get("at_edge") is True,
        "tried": [(f"{number(t.get('lr')) or 0:g}", figures.percent(t.get("accuracy")), len(records_of(t.get("seeds")))) for t in tried],
    }


def records_of(value: object) -> Json:
    """A mapping, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def cell_row(row: Json) -> Json:
    """A run of the list of all runs."""
    rate = number(row.get("lr"))
    own = {"name": clip(row.get("name"), 120), "accuracy": figures.accuracy(row), "rate": "–" if rate is None else f"{rate:g}"}
    return own | measured(row)
