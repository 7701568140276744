"""`vaopd lmms-eval`: avg@k on the paper's benchmarks, through lmms-eval in an environment of its own (docs/benchmarks.md)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from vaopd.errors import ConfigError, EvaluationError, ModelError
from vaopd.evaluate.lmms_benchmarks import BENCHMARKS, VERSION, Benchmark, average, chosen, score, standard_error
from vaopd.evaluate.lmms_judge import Judge, relay
from vaopd.evaluate.lmms_run import OURS, Result, Settings, finished, run, versions
from vaopd.files import claimed, replace_text
from vaopd.models.load import BUILTIN, locate

PYTHON_VARIABLE = "VAOPD_LMMS_PYTHON"
RESULT = "benchmarks.json"
MANY_TRUNCATED = 0.25
SECRET_ARGUMENT = re.compile(r"(^|,)\s*(\w*api_?key|(hf_|access_|auth_)?token|\w*secret|\w*password)\s*=|//[^/,]*@", re.IGNORECASE)
Say = Callable[[str], None]


def evaluate_benchmarks(
    model: str,
    tasks: Sequence[str],
    out: Path,
    *,
    python: str | None = None,
    k: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 4096,
    seed: int = 1,
    rows: int = 64,
    limit: int | None = None,
    judge: Judge | None = None,
    backend: str = OURS,
    model_args: str = "",
    include: Path | None = None,
    say: Say = lambda text: None,
    on_progress: Callable[[int, int, str], None] = lambda done, of, text: None,
) -> dict[str, Any]:
    """Run k samples of each benchmark, but for those that `out` has already, and return what `out/benchmarks.json` says.

    Args:
        tasks: names of `BENCHMARKS`, or TASK=METRIC of any task of lmms-eval.
        out: a folder for each sample, NAME/sample-J, and the result.
        python: of lmms-eval's environment; None: the environment variable VAOPD_LMMS_PYTHON.
        limit: the first questions of each benchmark alone, to try a set-up.
        include: a folder with task files of one's own.
        say: is told what a reader of the numbers has to know.
        on_progress: samples done, of how many, and what is running.

    Raises:
        ConfigError, ModelError: before anything is run.
        CheckpointError: `out` is of another evaluation, or another process is writing to it.
        EvaluationError: a benchmark has no result, or one that can't be trusted.
    """
    benchmarks = chosen(tasks or list(BENCHMARKS), judge=judge is not None)
    if SECRET_ARGUMENT.search(model_args):
        raise ConfigError("--model-args has a secret in it, and every result is written with them. Take a server that asks for none")
    common = Settings("", *identity(model, backend), backend, model_args, temperature, max_tokens, seed, limit, None)
    interpreter = _interpreter(python)
    found = versions(interpreter)
    for text in _remarks(benchmarks, found, backend, limit):
        say(text)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be a folder ({error.strerror}). Name another") from None
    with claimed(out, "--out FOLDER"):
        entries = _entries(benchmarks, common, out, k, judge, partial(run, python=interpreter, rows=rows), include, say, on_progress)
        for name, entry in entries.items():
            if (entry["truncated"] or 0) > MANY_TRUNCATED:
                say(f"{name}: {100 * entry['truncated']:.0f} % of the responses were cut at {max_tokens} tokens; raise --max-tokens")
        result = {
            "model": model,
            "weights": common.weights,
            "k": k,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            "limit": limit,
            "backend": backend,
            "model_args": model_args,
            "versions": found,
            "benchmarks": entries,
            "groups": groups(entries),
        }
        replace_text(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _entries(
    benchmarks: Sequence[Benchmark],
    common: Settings,
    out: Path,
    k: int,
    judge: Judge | None,
    run_sample: Callable[..., Result],
    include: Path | None,
    say: Say,
    on_progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Every benchmark's `summary`, of the samples that are there and of those that are missing, run now."""
    settings = {b.name: replace(common, task=b.task, judge=judge.model if judge and b.judged else None) for b in benchmarks}
    results = {b.name: [finished(_folder(out, b, j), settings[b.name]) for j in range(1, k + 1)] for b in benchmarks}
    done = sum(r is not None for rs in results.values() for r in rs)
    if done:
        say(f"{done} of {k * len(benchmarks)} samples are there already")
    progress = _Progress(done, k * len(benchmarks), on_progress)
    entries: dict[str, Any] = {}
    with relay(judge) if judge and any(b.judged for b in benchmarks) else nullcontext() as channel:
        for b in benchmarks:
            own = partial(run_sample, benchmark=b, settings=settings[b.name], include=_include(b, include))
            own = partial(own, judge=channel if b.judged else None, key=judge.key if judge else None)
            entries[b.name] = summary(b, _complete(b, results[b.name], out, own, common.limit, say, progress), settings[b.name])
    return entries


@dataclass
class _Progress:
    """Samples done, of how many; `show` is told with what is running."""

    done: int
    of: int
    show: Callable[[int, int, str], None]

    def tell(self, name: str, text: str = "") -> None:
        self.show(self.done, self.of, f"{name}, {text}" if text else name)


def _complete(
    benchmark: Benchmark,
    there: Sequence[Result | None],
    out: Path,
    run_sample: Callable[..., Result],
    limit: int | None,
    say: Say,
    progress: _Progress,
) -> list[Result]:
    """The samples that are there, and those that are missing, run now."""
    drawn: list[Result] = []
    for number, result in enumerate(there, 1):
        if result is None:
            tell = partial(progress.tell, f"{benchmark.name} {number}/{len(there)}")
            tell()
            result = run_sample(folder=_folder(out, benchmark, number), number=number, on_progress=tell)
            progress.done += 1
            progress.tell("")
        drawn.append(result)
        for warning in (check_drawn(benchmark, drawn, limit), check_judged(benchmark, drawn)):
            if warning:
                say(warning)
    return drawn


def check_judged(benchmark: Benchmark, results: Sequence[Result]) -> str | None:
    """A warning where the last sample is the judge's by name only."""
    if not benchmark.judged or results[-1].judged:
        return None
    return (
        f"{benchmark.name}: the judge was asked about none of the {results[-1].questions} answers of sample {len(results)}; "
        "lmms-eval graded all of them by itself. Look into the sample's out/ before you call this a judged score"
    )


def summary(benchmark: Benchmark, results: Sequence[Result], settings: Settings) -> dict[str, Any]:
    """avg@k of one benchmark with its standard error over clusters of questions, in percent."""
    parts = average([result.parts for result in results])
    error = standard_error(parts)
    return {
        "mean": score(parts),
        "se": None if math.isnan(error) else error,  # of one question nothing is known
        "n": results[0].questions,
        "samples": [result.score for result in results],
        "rule": benchmark.rule,
        "task": benchmark.task,
        "judge": settings.judge,
        "tokens": _mean([result.tokens for result in results]),
        "truncated": _mean([result.truncated for result in results]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def groups(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The paper's two means, mathematics and visual understanding, where all of their benchmarks are there."""
    members = {name: [b.name for b in BENCHMARKS.values() if b.math == is_math] for name, is_math in (("math", True), ("visual", False))}
    return {
        group: {
            "mean": sum(entries[name]["mean"] for name in names) / len(names),
            "se": math.sqrt(sum(entries[name]["se"] ** 2 for name in names)) / len(names),
        }
        for group, names in members.items()
        if all(name in entries and entries[name]["se"] is not None for name in names)
    }


def check_drawn(benchmark: Benchmark, results: Sequence[Result], limit: int | None) -> str | None:
    """Refuse a sample that repeats an earlier one word for word: the backend doesn't draw, and avg@k would be one sample k times.

    A few short answers may be equal by chance, so with a limit it is a warning, which is returned.
    """
    same = [number for number, earlier in enumerate(results[:-1], 1) if earlier.answers == results[-1].answers]
    if not same:
        return None
    text = f"{benchmark.name}: sample {len(results)} has the answers of sample {same[0]}, word for word"
    if limit is None:
        raise EvaluationError(
            f"{text}. The backend doesn't draw them anew (a temperature of 0, a fixed seed, a cache of responses?). "
            "Delete the sample's folder and take another --backend"
        )
    return f"{text}; with {limit} questions that can be chance"


def identity(model: str, backend: str) -> tuple[str, str | None]:
    """A model as lmms-eval is given it, and a sha256 over a folder's files; a hub name, or a server's, has none.

    Raises:
        ModelError: no such folder; a path that lmms-eval's arguments can't hold.
    """
    path = locate(model) if backend == OURS or model.startswith(BUILTIN) or Path(model).is_dir() else model
    if not Path(path).is_dir():
        return path, None
    path = str(Path(path).resolve())
    if set(path) & set(",='\"{}[]"):
        raise ModelError(f"lmms-eval separates its arguments by commas and '=', and the model's path has one: {path}. Rename or link it")
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*")):
        if file.suffix in (".safetensors", ".json", ".jinja", ".txt"):
            with file.open("rb") as content:
                digest.update(f"{file.name}\0".encode() + hashlib.file_digest(content, "sha256").digest())
    return path, digest.hexdigest()


def _interpreter(python: str | None) -> str:
    """An absolute path, but not that of the file it may link to: an environment's python is a link."""
    given = python or os.environ.get(PYTHON_VARIABLE)
    if not given:
        raise ConfigError(
            "lmms-eval runs in an environment of its own. Make one (docs/benchmarks.md has the two commands) and give its Python: "
            f"--lmms-python .venv/lmms/bin/python, or the environment variable {PYTHON_VARIABLE}"
        )
    return os.path.abspath(given)


def _remarks(benchmarks: Sequence[Benchmark], found: Mapping[str, str], backend: str, limit: int | None) -> list[str]:
    """What is said before anything runs. Raises `ConfigError` where the backend isn't there."""
    if backend == OURS and "vaopd" not in found:
        raise ConfigError("lmms-eval's environment has no vaopd, which answers as --backend vaopd. Install it there: pip install vaopd")
    remarks = [f"lmms-eval is {found['lmms-eval']}; the table of benchmarks is of {VERSION}"] if found["lmms-eval"] != VERSION else []
    remarks += [f"{b.name}: no judge was given, so it is graded by rule: {b.rule}" for b in benchmarks if b.ours]
    remarks += [f"only the first {limit} questions of each: this tries the set-up and measures nothing"] if limit is not None else []
    if backend != OURS:
        remarks.append(f"--backend {backend} samples as lmms-eval has it: docs/benchmarks.md says where that isn't the paper's protocol")
    return remarks


def _folder(out: Path, benchmark: Benchmark, number: int) -> Path:
    return out.absolute() / benchmark.name / f"sample-{number}"


def _include(benchmark: Benchmark, include: Path | None) -> Path | None:
    if benchmark.ours:
        return Path(str(files("vaopd") / "evaluate" / "lmms_tasks"))
    return include.absolute() if include is not None and benchmark.name not in BENCHMARKS else None
