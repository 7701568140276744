"""The page: everything from files in, one self-contained HTML file out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vaopd.errors import DataError
from vaopd.files import replace_text
from vaopd.report import figures
from vaopd.report.heat import LEVELS, clip, heat_map_svg, scale_css, significant, visible
from vaopd.report.read import Json, Run, is_run, number, read_run, read_study, records
from vaopd.report.samples import choose
from vaopd.report.seeds import Group, differences, mean_gains, with_means

PAGE_BYTES = 3_000_000
SAMPLE_BUDGET = 2_000_000  # characters for rollouts and their pictures
TEMPLATES = Path(__file__).parent / "templates"
MAIN_KEYS = ("method", "student", "teacher")
CONFIG_ROWS = 80


def environment() -> Environment:
    """Escapes everything, spells out what is invisible, and fails on a name that is not there."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    env.filters |= {
        "gain": figures.gain_text,
        "verdict": figures.verdict,
        "nats": figures.nats,
        "percent": figures.percent,
        "sig": significant,
        "clip": clip,
    }
    return env


def digest(text: str) -> str:
    """A Content-Security-Policy source that allows exactly this inline text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def flatten(value: Any, prefix: str = "", depth: int = 0) -> dict[str, str]:
    """`{"optim": {"lr": 1e-6}}` -> `{"optim.lr": "1e-06"}`; long lists and deep mappings are counted, not spelled out."""
    out: dict[str, str] = {}
    for name, entry in list(value.items())[: 5 * CONFIG_ROWS]:
        path = f"{prefix}{clip(name, 60)}"
        if isinstance(entry, dict) and entry and depth < 3:
            out |= flatten(entry, f"{path}.", depth + 1)
        elif isinstance(entry, dict | list):
            plain = isinstance(entry, list) and 0 < len(entry) <= 8 and not any(isinstance(e, dict | list) for e in entry)
            out[path] = clip(", ".join(map(str, entry)), 160) if plain else f"{len(entry)} entries"
        else:
            out[path] = clip("–" if entry is None else entry, 160)
        if len(out) > 5 * CONFIG_ROWS:
            break
    return out


def config_table(runs: Sequence[Run]) -> Json:
    """Rows of (key, value per run), those that differ first; and the runs' names."""
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(k for f in flat for k in f))
    rows = [(key, [f.get(key, "–") for f in flat]) for key in keys]
    differ = [row for row in rows if len(set(row[1])) > 1]
    same = [(key, values[0]) for key, values in rows if len(set(values)) == 1]
    same.sort(key=lambda row: row[0] not in MAIN_KEYS)
    return {
        "names": [figures.label(r.name) for r in runs],
        "differ": differ[:CONFIG_ROWS],
        "same": same[:CONFIG_ROWS],
        "hidden": max(0, len(rows) - CONFIG_ROWS),
    }


def evaluation_size(runs: Sequence[Run], summary: Json) -> tuple[str, str]:
    """(questions, k) of the final evaluation, as text; `k` itself where they are not known or not the same."""
    found = {(number(r.get("questions")), number(r.get("k"))) for r in (summary, *(run.result for run in runs)) if number(r.get("k"))}
    if len(found) != 1:
        return "", "k"
    questions, k = found.pop()
    return ("" if questions is None else f"{questions:,.0f}"), f"{k:.0f}"


def gains_of(runs: Sequence[Run], summary: Json) -> dict[str, Json]:
    """Gain over the student by run: from the study's summary, else from the runs' own evaluations."""
    own = {run.name: run.result["gain"] for run in runs if isinstance(run.result.get("gain"), dict)}
    return records(summary.get("gains")) or records(own)


def seeds(groups: Sequence[Group], summary: Json) -> int:
    """The fewest repetitions of anything compared."""
    stated = summary.get("seeds")
    count = number(len(stated) if isinstance(stated, list) else stated)
    return int(count) if count else min(len(g.runs) for g in groups)


def results(runs: Sequence[Run], groups: Sequence[Group], summary: Json) -> Json:
    """Headline, table and plots of the final evaluation. A single run's own model is called `trained`."""
    models, gains = figures.all_models(runs, summary), gains_of(runs, summary)
    if len(runs) == 1:
        models = {"trained" if name == runs[0].name else name: m for name, m in models.items()}
        gains = {"trained" if name == runs[0].name else name: g for name, g in gains.items()}
    colours = {name: f"c{g.colour}" for g in groups for name in (g.key, "trained", *(run.name for run in g.runs))} | {"student": "grey"}
    between = differences(models, groups)
    pooled, shown = with_means(models, groups), mean_gains(gains, groups) | between
    curve = summary.get("mass_curve") or next((m for r in runs if (m := r.result.get("mass_curve"))), None)
    return {
        "rows": figures.model_rows(pooled, shown | gains, colours),
        "accuracy_plot": Markup(figures.accuracy_plot(pooled, colours)),
        "gain": gains.get("trained"),
        "undecided": [figures.label(name) for name, g in shown.items() if figures.includes_zero(g)],
        "forest": Markup("" if len(runs) == 1 else figures.forest_plot(shown, colours)),
        "mass_plot": Markup(figures.mass_figure(curve)),
        "between": bool(between),
        "size": evaluation_size(runs, summary),
    }


def context(runs: Sequence[Run], title: str, summary: Json, notes: Sequence[str], budget: int) -> Json:
    """All that the template reads."""
    groups = figures.group_runs(runs)
    drawn, absent = figures.curves(groups)
    single = len(runs) == 1
    run_notes = [note if single else f"{run.name}: {note}" for run in runs for note in run.notes]
    seconds = number(summary.get("seconds"))
    return {
        "title": title,
        "single": single,
        "method": figures.label(figures.method(runs[0])) if single else "",
        "runs": runs,
        "groups": groups,
        "result": results(runs, groups, summary),
        "curves": [(curve, Markup(svg), reading) for curve, svg, reading in drawn],
        "absent": absent,
        "points": max((len(rows) for run in runs for rows in (run.train, run.evals)), default=0),
        "health": [figures.health(run) for run in runs],
        "samples": choose(runs, [figures.label(run.name) for run in runs], budget),
        "config": config_table(runs),
        "notes": [*notes, *run_notes],
        "seeds": seeds(groups, summary),
        "seconds": figures.duration(seconds) if seconds is not None else "",
        "levels": LEVELS,
    }


def render(runs: Sequence[Run], title: str, summary: Json, notes: Sequence[str]) -> str:
    """The page, at most `PAGE_BYTES` long: where it would be longer, fewer questions are shown (and the page says how many)."""
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8") + scale_css()
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    template = environment().get_template("page.html")
    policy = f"default-src 'none'; img-src data:; style-src {digest(css)}; script-src {digest(script)}; base-uri 'none'; form-action 'none'"
    fixed = {"css": Markup(css), "script": Markup(script), "policy": Markup(policy)}
    budget = SAMPLE_BUDGET
    while True:
        page = template.render(**context(runs, title, summary, notes, budget), **fixed)
        if len(page.encode()) <= PAGE_BYTES or budget < 1000:
            return page
        budget //= 2


def save(page: str, out: Path) -> Path:
    """Whole or not at all: a reader never sees half a page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page)
    return out


def write_report(run: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Path:
    """The page of one run's folder, of a study's folder, or of several runs side by side; returns where it was written.

    `out` is a file or a folder for `report.html`; without it one folder's page lies in that folder. Raises `DataError` if a folder
    holds no run, or if several runs are given without `out`.
    """
    paths = [Path(run)] if isinstance(run, Path | str) else [Path(p) for p in run]
    if not paths:
        raise DataError("A report needs at least one run's folder; none was given.")
    if len(paths) > 1 and out is None:
        raise DataError(f"{len(paths)} runs were given: say where their common page goes (out=…).")
    target = Path(out) if out is not None else paths[0]
    target = target if target.suffix == ".html" else target / "report.html"
    if len(paths) == 1 and not is_run(paths[0]):
        from vaopd.report.study import is_study, write_study  # which is built from the pieces of this module

        return write_study(paths[0], target) if is_study(paths[0]) else write_comparison(paths[0], target)
    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return save(render(runs, title, {}, []), target)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def write_comparison(study: Path | str, out: Path | str | None = None) -> Path:
    """The page of a study's folder, its cells side by side. Raises `DataError` if no folder in it holds a run."""
    study = Path(study)
    runs, summary, notes = read_study(study)
    name = summary.get("name")
    target = Path(out) if out is not None else study / "report.html"
    return save(render(runs, clip(name or study.resolve().name, 80), summary, notes), target)


def write_heat_map(run: Path | str, out: Path | str, *, question: str | None = None, rollout: int = 0, title: str = "") -> Path:
    """The standalone heat-map picture (SVG) of one question of the run's last evaluation. Raises `DataError` if it is not there."""
    read = read_run(Path(run))
    evaluation = read.last or read.first
    rows = [r for r in (evaluation.rows if evaluation else []) if question is None or str(r.get("id")) == question]
    if not rows:
        raise DataError(f"{run} has no sampled question{'' if question is None else f' {question!r}'} to draw.")
    return save(heat_map_svg(rows[0], read.path, rollout=rollout, title=title), Path(out))
