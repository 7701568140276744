"""What a person sees in the terminal: progress bars, tables, one clear message for a mistake."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from vaopd.config import RunConfig, StudyConfig

if TYPE_CHECKING:
    from vaopd.analysis.forecast import Forecast
    from vaopd.analysis.study import Job
    from vaopd.train.loop import Progress as TrainingHooks

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A plain line; nothing in it is markup, or a command to the terminal."""
    console.print(escape(_spelled_out(text)), soft_wrap=True)


def error(text: str) -> None:
    """A user's mistake: what is wrong and what to do."""
    errors.print(f"[bold red]error[/]  {escape(_spelled_out(text))}", soft_wrap=True)


def _spelled_out(text: str) -> str:
    """Control characters, which file names and data may hold, as `\\x1b`; line ends and tabs stay."""
    return "".join(repr(sign)[1:-1] if unicodedata.category(sign) == "Cc" and sign not in "\n\t" else sign for sign in text)


def _bars(*, time_left: bool = True) -> Progress:
    columns = [
        # Widths that fit a terminal of 80 columns.
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        *([TimeRemainingColumn(compact=True)] if time_left else []),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
    ]
    return Progress(*columns, console=console)


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


class TrainingView:
    """The progress bar of one run: rate, time left, loss, mean VA, held-out accuracy."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.bars = config, _bars()
        self.last: Mapping[str, Any] | None = None  # training row
        self.accuracy: float | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> TrainingView:
        say(f"{self.config.run.name}: {self.config.method}, {self.config.student} learns from {self.config.teacher or 'solutions'}")
        if self.config.method.off_policy:
            say("responses  the data's solutions")
        else:
            rollouts = self.config.rollouts
            say(f"rollouts   {rollouts.k} per prompt, temperature {rollouts.temperature}, top-p {rollouts.top_p}")
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def progress(self) -> TrainingHooks:
        """The hooks that `vaopd.train` calls."""
        from vaopd.train.loop import Progress as Hooks

        return Hooks(
            on_check=lambda text: say(f"checks     {text}"),
            on_row=self._on_row,
            on_peak=lambda mebibytes: say(f"memory     at most {mebibytes:,.0f} MiB"),
            on_final=self._on_final,
        )

    def _on_row(self, row: Mapping[str, Any], steps: int) -> None:
        if self.task is None:
            self.task = self.bars.add_task("training", total=steps, rate="", text="", completed=row["step"])
        if row["kind"] == "eval":
            self.accuracy = row["accuracy"]
        else:
            self.last = row
        if self.last:
            text = f"loss {_number(self.last['loss'], 3)} VA {_number(self.last['va'], 3)} held-out {_percent(self.accuracy)}"
            self.bars.update(self.task, completed=row["step"], rate=f"{self.last['seconds']:.1f} s/step", text=text)

    def _on_final(self, model: str, done: int, of: int) -> None:
        description = f"test {model}" if model != "trained" else "test"
        found = [task for task in self.bars.tasks if task.description == description]
        task = found[0].id if found else self.bars.add_task(description, total=of, rate="", text="")
        self.bars.update(task, completed=done)


MOST_BARS = 6  # jobs with a bar each; more share one


class StudyView:
    """One bar per cell of a study; one over all cells where there are many."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.told: set[str] = set()  # checks of the cells that were shown; most cells have the same
        self.began = (0.0, 0.0)  # of the bar over all cells: when it appeared, and how many were done then

    def __enter__(self) -> StudyView:
        if not self.config.is_matrix:
            say(f"{self.config.name}: {len(self.config.methods)} methods x {len(self.config.seeds)} seeds, run folder {self.config.run}")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bars:
            self.bars.stop()

    def update(self, states: Mapping[Job, str]) -> None:
        """Redraw from the cells' own logs and metrics."""
        many, first = len(states) > MOST_BARS, next(iter(states)).name
        if self.bars is None or (many and first not in self.tasks):  # a phase begins
            self.__exit__(None, None, None)
            self.bars, self.tasks = _bars(time_left=not many), {}
            self.bars.start()
        for job, state in states.items():
            self._tell_checks(job, state)
        if many:
            self._update_one(self.bars, states, first)
        else:
            self._update_each(self.bars, states)

    def _update_each(self, bars: Progress, states: Mapping[Job, str]) -> None:
        for job, state in states.items():
            if job.name not in self.tasks:
                self.tasks[job.name] = bars.add_task(job.name, total=job.steps or 1, rate="", text="")
            bars.update(self.tasks[job.name], **_job_fields(job, state))

    def _tell_checks(self, job: Job, state: str) -> None:
        from vaopd.analysis.study import checks

        if job.metrics is not None and state == "running":
            for line in checks(job):
                if line not in self.told:
                    say(line)
                    self.told.add(line)

    def _update_one(self, bars: Progress, states: Mapping[Job, str], first: str) -> None:
        """A bar over the cells of a phase: those done, and the time left at the pace of those done and of the steps of the others."""
        whole = sum(state == "done" for state in states.values())
        done = whole + sum(_share_done(job) for job, state in states.items() if state == "running")
        if first not in self.tasks:
            self.tasks[first] = bars.add_task(first.partition("/")[0] if "/" in first else "cells", total=len(states), rate="", text="")
            self.began = time.monotonic(), done
        began, before = self.began
        pace = (time.monotonic() - began) / (done - before) if done - before > 0.05 else None
        left = "" if pace is None else f"{_duration((len(states) - done) * pace)} left"
        running = [job.name.rpartition("/")[2] for job, state in states.items() if state == "running"]
        bars.update(self.tasks[first], completed=whole, rate=left, text=", ".join(running))


def _share_done(job: Job) -> float:
    """Of a running job, from its last step; the final evaluation counts as nothing."""
    from vaopd.analysis.study import training_rows

    rows = training_rows(job)
    return 0.9 * rows[-1]["step"] / job.steps if rows and job.steps else 0.0


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def show_plan(config: StudyConfig, entries: Sequence[Forecast], workers: int) -> None:
    """What a study consists of and how long it takes, before it starts."""
    from vaopd.analysis.forecast import remaining_seconds

    say(f"{config.name}: {_axes(config)}, run folder {config.run}")
    rows = {}
    for entry in entries:
        name = " ".join(part for part in (entry.phase, entry.regime, entry.method) if part)
        rows[name] = [str(entry.cells), str(entry.done), f"{entry.seconds:.0f}", f"{entry.cells * entry.seconds:.0f}", entry.source]
    _show_rows(("cells", "number", "done", "s each", "s in all", "seconds from"), rows)
    cells, done = sum(entry.cells for entry in entries), sum(entry.done for entry in entries)
    seconds = remaining_seconds(entries, workers)
    say(f"in all     {cells} cells, {done} done; the others take about {_duration(seconds)} with {workers} side by side, baselines extra")
    if any(entry.source == "calibrated" for entry in entries):
        say("calibrated: from three training steps and one evaluation on this machine as it is now, the dearest kind of cell for all")


def _axes(config: StudyConfig) -> str:
    """`2 methods x 3 students x 8 seeds`: the axes with more than one value."""
    sizes = {"methods": config.methods, "students": config.students, "teachers": config.teachers, "data sizes": config.train_sizes}
    named = [f"{len(values)} {name}" for name, values in {**sizes, "regimes": config.regimes}.items() if len(values) > 1]
    text = " x ".join([*named, f"{len(config.seeds)} seeds"])
    if config.development_seeds:
        text += f"; {len(config.rates_to_try)} learning rates of the methods on {len(config.development_seeds)} development seeds"
    return text


def _job_fields(job: Job, state: str) -> dict[str, Any]:
    from vaopd.analysis.study import training_rows

    if job.metrics is None:
        return {"completed": int(state == "done"), "text": "evaluation" if state != "waiting" else "waiting"}
    rows = training_rows(job)
    if not rows:
        return {"text": "starting" if state == "running" else state}
    row = rows[-1]
    text = f"loss {_number(rows[0]['loss'], 2)} → {_number(row['loss'], 2)}"
    text += "" if state != "running" or row["step"] < job.steps else ", evaluating"
    return {"completed": row["step"], "rate": f"{row['seconds']:.1f} s/step", "text": text}


@contextmanager
def counting(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a number of parts."""
    with _bars() as bars:
        task = bars.add_task(description, total=None, rate="", text="")
        yield lambda done, of: bars.update(task, completed=done, total=of)


@contextmanager
def sampling() -> Iterator[Callable[[int, int, str], None]]:
    """A bar over the samples of all benchmarks, with the one that is running."""
    with _bars() as bars:
        task = bars.add_task("samples", total=None, rate="", text="")
        yield lambda done, of, text: bars.update(task, completed=done, total=of, text=text)


@contextmanager
def looking() -> Iterator[Callable[[str], Callable[[int, float], None]]]:
    """A bar per data set that is looked at: rows, how many a second, and the time left."""
    with _bars() as bars:

        def begin(name: str) -> Callable[[int, float], None]:
            task, began = bars.add_task(f"data.{name}", total=None, rate="", text=""), time.perf_counter()

            def update(rows: int, share: float) -> None:
                speed = rows / max(time.perf_counter() - began, 1e-9)
                bars.update(task, completed=rows, total=round(rows / share) if share else None, rate=f"{speed:,.0f} rows/s")

            return update

        yield begin


def show_models(models: Mapping[str, Mapping[str, Any]], *, questions: int, k: int) -> None:
    """The table of avg@k, blind accuracy and mean advantage."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in (f"avg@{k} ± se", "blind", "no image", "mean VA", "tokens"):
        table.add_column(column, justify="right")
    for name, entry in models.items():
        accuracy = "-" if entry["accuracy"] is None else f"{_percent(entry['accuracy'])} ± {_percent(entry['se'])}"
        blind = [_percent(entry.get(key)) for key in ("blind_degraded", "blind_removed")]
        table.add_row(escape(name), accuracy, *blind, _number(entry.get("va"), 3), _number(entry["tokens"], 1))
    console.print(table)
    say(f"{questions} questions, {k} samples each at the stated temperature; blind: image pixelated; mean VA in nats per token")


def show_run(folder: Path) -> None:
    """What a finished run measured, and which rows it could not use."""
    for name, file in json.loads((folder / "data.json").read_text(encoding="utf-8"))["files"].items():
        for reason, count in file["skipped"].items():
            say(f"data.{name}: {count} of {file['rows']} rows skipped: {reason}")
    path = folder / "eval.json"
    if not path.exists():
        say(f"run: {folder}")
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    order = ("student", "trained", "teacher")
    models = {name: result["models"][name] for name in order if name in result["models"]}
    show_models(models, questions=result["questions"], k=result["k"])
    _show_gain("trained", result["gain"])
    _show_mass(result["mass_curve"])
    say(f"run: {folder}")


def show_study(summary: Mapping[str, Any]) -> None:
    """What a study measured."""
    if "comparisons" in summary:
        return _show_matrix(summary)
    show_models(summary["models"], questions=summary["questions"], k=summary["k"])
    for name, measured in summary["gains"].items():
        _show_gain(name, measured)
    _show_mass(summary["mass_curve"])
    say("One seed is no verdict on which method is better.")
    say(f"took {summary['seconds']} s")
    return None


def _show_matrix(summary: Mapping[str, Any]) -> None:
    """The tables of a study with several seeds or axes: means, paired differences, and how the rates were chosen."""
    teachers = len(summary["study"]["teachers"]) > 1
    for row in summary["selection"]:
        tried = ", ".join(f"{entry['lr']:g}: {_percent(entry['accuracy'])}" for entry in row["tried"])
        edge = "; the best is at the end of the tried ones, so a better one may lie beyond" if row["at_edge"] else ""
        say(f"rate of {_where(row, teachers)}: {row['chosen']:g} (held-out accuracy {tried}){edge}")
    header = ("mean over seeds", "runs", f"avg@{summary['k']} [95 %]", "blind", "mean VA", "own gap")
    _show_rows(header, {_where(row, teachers): _mean_cells(row) for row in summary["means"]})
    differences = {
        f"minus {summary['baseline']}": [*summary["comparisons"], *summary["trends"]],
        "one method in two settings": summary["settings"],
    }
    for title, rows in differences.items():
        if rows:
            columns = (title, "points [95 %]", "seeds", "p", "Holm's p")
            _show_rows(columns, {_where(row, teachers): _difference_cells(row) for row in rows})
    if tested := [row["smallest_p"] for rows in differences.values() for row in rows]:
        say(f"p: two-sided sign-flip test over seeds; so few seeds can't give one below {max(tested):.2g}")
    say("mean VA: by the teacher on own answers; own gap: log p(image) - log p(degraded) of the model on fixed answers; nats per token")
    say(f"the runs took {summary['cpu_seconds'] / 60:.0f} minutes of CPU time")


def _where(row: Mapping[str, Any], teachers: bool) -> str:
    """The method and its place on the axes; a trend says from where to where."""
    size = None if row.get("train_size") is None else f"{row['train_size']} rows"
    trend = f"{row['axis']} {row['last']} against {row['first']}" if "axis" in row else None
    if row.get("student"):
        return " ".join(part for part in ("  ", row["student"], row["method"], row["regime"], size) if part)
    return " ".join(str(part) for part in (row["method"], row.get("regime"), row.get("teacher") if teachers else None, size, trend) if part)


def _mean_cells(row: Mapping[str, Any]) -> list[str]:
    accuracy = row["accuracy"]
    interval = "" if accuracy["low"] is None else f" [{_percent(accuracy['low'])}, {_percent(accuracy['high'])}]"
    nats = [_number(row[key], 3) for key in ("va", "student_va")]
    return [str(row["runs"]), _percent(accuracy["mean"]) + interval, _percent(row["blind_degraded"]), *nats]


def _difference_cells(row: Mapping[str, Any]) -> list[str]:
    points = row["points"]
    interval = "" if points["low"] is None else f" [{points['low']:+.1f}, {points['high']:+.1f}]"
    return [f"{points['mean']:+.1f}{interval}", str(points["n"]), f"{row['p']:.3g}", f"{row['holm']:.3g}"]


def _show_gain(name: str, measured: Mapping[str, float] | None) -> None:
    if measured:
        say(f"{name} against student: {measured['points']:+.1f} points, 95 % interval {measured['low']:+.1f} to {measured['high']:+.1f}")


def _show_mass(curve: Mapping[str, list[float]] | None) -> None:
    if curve:
        share = min(zip(curve["tokens"], curve["mass"], strict=True), key=lambda pair: abs(pair[0] - 0.1))[1]
        say(f"the top 10 % of tokens hold {100 * share:.0f} % of the visual advantage")


def show_probe(result: Mapping[str, Any]) -> None:
    """What `vaopd probe` measured: where the tokens' divergence and advantage sit, and what depends on the image."""
    say(f"{result['model']} scored by {result['teacher']}: {result['questions']} questions, {result['k']} samples each")
    shares = {"top 20 % by advantage": result["visual"]}
    shares |= {f"masked: {which} 10 %": share for which, share in result["masking"].items()}
    shares |= {f"class: {name}": share for name, share in result["classes"].items()}
    _show_rows(("share of all, %", "tokens", "KL", "VA"), {n: [_percent(s[c]) for c in ("tokens", "kl", "va")] for n, s in shares.items()})
    nats = {"student's entropy": result["entropy"], "KL": result["kl"]}
    nats |= {f"log p(image) - log p(degraded), {name}": means for name, means in result["fixed_responses"].items()}
    columns = ("all", "visual", "other")
    _show_rows(("mean, nats per token", *columns), {name: [_number(means[c], 3) for c in columns] for name, means in nats.items()})
    if "views" in result:
        views = {name: [_number(r["va"], 3), _percent(r["va_top10"]), _percent(r["same_tokens"])] for name, r in result["views"].items()}
        _show_rows(("view", "mean VA", "in top 10 %", "same tokens %"), views)
    if "gradients" in result:
        _show_gradients(result["gradients"])
    seen = {name: _percent(value) for name, value in result["reliance"].items()}
    say(f"accuracy   seeing {seen['seeing']}, image degraded {seen['degraded']}, image removed {seen['removed']}")
    say(f"rollouts   {_number(result['effective_rollouts']['mean'], 2)} of {result['k']} really count under va_opd")
    say(f"responses  {_number(result['tokens'], 1)} tokens, {_percent(result['repetition'])} % of their 4-grams repeated")
    _show_mass(result["mass_curve"])


def _show_gradients(found: Mapping[str, Mapping[str, Any]]) -> None:
    numbers = ("norm", "signal", "cosine_opd", "cosine_accuracy")
    header = ("gradient of", "norm", "signal", "cosine to OPD", "to accuracy")
    _show_rows(header, {name: [_number(entry[key], 3) for key in numbers] for name, entry in found.items()})
    parts = [(kind, name) for kind in ("classes", "directions") for name in next(iter(found.values()))[kind]]
    header = ("share of its square, %", *(name for _, name in parts))
    _show_rows(header, {name: [_percent(entry[kind][part]) for kind, part in parts] for name, entry in found.items()})


def show_benchmarks(result: Mapping[str, Any]) -> None:
    """The table of the benchmarks, and the paper's two means where all of their benchmarks are there."""
    rows = {
        name: [f"{entry['mean']:.1f} ± {_number(entry['se'], 1)}", str(entry["n"]), _percent(entry["truncated"]), entry["rule"]]
        for name, entry in result["benchmarks"].items()
    }
    rows |= {name: [f"{group['mean']:.1f} ± {group['se']:.1f}", "", "", "mean of the above"] for name, group in result["groups"].items()}
    _show_rows((result["model"], f"avg@{result['k']} ± se", "n", "cut %", "rule"), rows)
    say(f"{result['k']} samples each at temperature {result['temperature']}; cut: responses that reached {result['max_tokens']} tokens")


def _show_rows(header: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for name, cells in rows.items():
        table.add_row(escape(name), *cells)
    console.print(table)


def show_answer(sample: Mapping[str, Any]) -> None:
    """An answer with its tokens shaded by visual advantage, the scale in nats, and the most visual tokens for readers without colour."""
    from vaopd.report.heat import level, nice_cap, read_tokens, readable, shades, ticks, token_text, visible
    from vaopd.report.samples import visual_tokens

    tokens = read_tokens(sample["rollouts"][0], 1)
    cap = nice_cap(token.va for token in tokens if token.va is not None)
    # The scale for dark pages: most terminals are, and there its faint end is faint. The faintest shades would only be noise.
    styles = ["" if i < 2 else f"{readable(colour)} on {colour}" for i, colour in enumerate(shades("va", "dark"))]
    say(f"question   {visible(sample['problem'])}")
    say(f"answered by {visible(sample['student'])}, scored by {visible(sample['teacher'])}")
    console.print(Text.assemble("\n", *((token_text(token.text), styles[level(token.va, cap)]) for token in tokens), "\n"))
    console.print(Text.assemble("visual advantage, nats: ", *((f" {nats} ", styles[index]) for index, nats in ticks(cap))))
    strongest = ", ".join(f"{text!r} {va:.2f}" for text, va in visual_tokens(tokens, most=8))
    say(f"most visual: {strongest or 'no token depends on the image'}")
