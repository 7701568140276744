"""One sample of one benchmark: one process of lmms-eval in its own environment and its own folder.

A process each, because some tasks of lmms-eval carry state from one evaluation into the next (OCRBench adds up in a module; HallusionBench
takes verdicts that it finds in the output folder), and because what is finished is then never run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaopd.errors import CheckpointError, ConfigError, DataError, EvaluationError
from vaopd.evaluate.lmms_benchmarks import Benchmark, Part, Sample, reported, score
from vaopd.evaluate.lmms_judge import Relay

OURS = "vaopd"  # the backend of lmms_model
FINISHED, LOG = "sample.json", "log.txt"
TOLERANCE = 0.011  # percentage points: lmms-eval rounds each of two composites to two decimals
LAST_LINES = 15
# Where lmms-eval's tasks find a judge, and where it finds plugins: nothing of the user's shell may decide that.
HIDDEN = re.compile(r"^(OPENAI_|AZURE_|JUDGE_|LMMS_|API_TYPE$|MODEL_VERSION$|USE_LLM_JUDGE$|NUM_IMAGE$|WANDB_)")
SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|_KEY)$")
UNREACHABLE = "http://127.0.0.1:9/v1"  # the discard port
FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED")  # what lmms-eval grades in the place of an answer


@dataclass(frozen=True)
class Settings:
    """What a sample depends on besides its number."""

    task: str  # lmms-eval's
    model: str
    weights: str | None  # sha256 of a folder's files; None for a hub name
    backend: str
    model_args: str
    temperature: float
    max_tokens: int
    seed: int
    limit: int | None
    judge: str | None  # the model that judges; None where a rule does


@dataclass(frozen=True)
class Result:
    """A finished sample."""

    parts: list[Part]
    questions: int
    score: float  # percent
    answers: str  # sha256 of all responses in order
    tokens: float | None  # mean length of a response
    truncated: float | None  # share cut at the length limit
    judged: int  # questions that the judge was asked


def versions(python: str) -> dict[str, str]:
    """What is installed in lmms-eval's environment. Raises `ConfigError` where lmms-eval isn't."""
    names = ("lmms-eval", "vaopd", "torch", "transformers", "datasets", "vllm", "math-verify")
    program = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    try:
        done = subprocess.run([python, "-c", program, *names], capture_output=True, text=True, timeout=60)
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"'{python}' can't be run as Python ({error}). Give the python of lmms-eval's environment") from None
    if "lmms-eval" not in found:
        raise ConfigError(f"lmms-eval isn't installed in the environment of '{python}'. docs/benchmarks.md has the two commands")
    return dict(found)


def command(python: str, benchmark: Benchmark, settings: Settings, number: int, include: Path | None, rows: int) -> list[str]:
    """The command line of sample `number` (from 1), to be run in a folder of its own."""
    seed = settings.seed + number - 1
    options = {
        "--model": settings.backend,
        "--model_args": _model_args(settings, number),
        "--tasks": benchmark.task,
        "--batch_size": str(rows),
        # top-p is 0.95 in some backends unless named. Servers and vLLM draw every sample alike without a seed of its own.
        "--gen_kwargs": f"temperature={settings.temperature},top_p=1.0,do_sample=True,max_new_tokens={settings.max_tokens},seed={seed}",
        "--seed": str(seed),
        "--output_path": "out",
    }
    if settings.limit is not None:
        options["--limit"] = str(settings.limit)
    if include is not None:
        options["--include_path"] = str(include)
    return [python, "-m", "lmms_eval", *(text for pair in options.items() for text in pair), "--log_samples"]


def _model_args(settings: Settings, number: int) -> str:
    if settings.backend == OURS:
        return ",".join(filter(None, (f"pretrained={settings.model},sample={number - 1},seed={settings.seed}", settings.model_args)))
    key = "model" if "vllm" in settings.backend else "model_version" if "openai" in settings.backend else "pretrained"
    return ",".join(filter(None, (f"{key}={settings.model}", settings.model_args)))


def environment(judge: Relay | None, key: str | None = None) -> dict[str, str]:
    """The user's without the judge's `key`, with the relay as the only judge; without one, an address that answers nobody."""
    base = {name: value for name, value in os.environ.items() if not HIDDEN.match(name) and not (key and key in value)}
    url, token = (judge.url, judge.token) if judge else (UNREACHABLE, "none")
    # Behind a proxy the relay would not be asked, and every answer be wrong.
    direct = ",".join(filter(None, ("127.0.0.1", base.get("no_proxy") or base.get("NO_PROXY"))))
    own = {"API_TYPE": "openai", "OPENAI_API_URL": url, "OPENAI_API_KEY": token, "WANDB_MODE": "disabled"}
    return base | own | {"no_proxy": direct, "NO_PROXY": direct}


def run(
    folder: Path,
    benchmark: Benchmark,
    settings: Settings,
    number: int,
    *,
    python: str,
    include: Path | None,
    rows: int,
    judge: Relay | None,
    key: str | None = None,
    on_progress: Callable[[str], None],
) -> Result:
    """Run sample `number` of a benchmark and keep it in `folder`, which appears only once it is complete.

    Args:
        key: the judge's, which lmms-eval isn't given.

    Raises:
        EvaluationError: lmms-eval failed, answers or verdicts are missing, or its own score isn't that of its samples.
    """
    work = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(work, ignore_errors=True)  # half a sample would be taken for verdicts on this one
    work.mkdir(parents=True)
    asked, failed = (judge.asked, len(judge.failures)) if judge else (0, 0)
    began = time.monotonic()
    arguments = command(python, benchmark, settings, number, include, rows)
    status, last = _execute(
        arguments, work, environment(judge, key), on_progress, give_up=lambda: judge is not None and len(judge.failures) > failed
    )
    if judge and len(judge.failures) > failed:
        raise EvaluationError(
            f"{benchmark.name}, sample {number}: the judge gave no verdict on an answer ({judge.failures[failed]}), which lmms-eval would "
            "count as wrong. So nothing of this sample was kept; run the same command to go on"
        )
    try:
        results, samples = read_output(work / "out", benchmark.task)
    except DataError as error:
        told = "\n".join(f"  {line}" for line in last)
        raise EvaluationError(
            f"{benchmark.name}, sample {number}: lmms-eval ended with status {status} and no result ({error}). "
            f"Its last lines, of {work / LOG}:\n{told}"
        ) from None
    result = graded(benchmark, settings, results, samples, judged=judge.asked - asked if judge else 0)
    entry = {"benchmark": benchmark.name, "settings": asdict(settings), **asdict(result)}
    (work / FINISHED).write_text(json.dumps(entry | {"seconds": round(time.monotonic() - began, 1)}, indent=1) + "\n", encoding="utf-8")
    os.replace(work, folder)
    return result


def _execute(
    arguments: Sequence[str], work: Path, env: Mapping[str, str], on_progress: Callable[[str], None], *, give_up: Callable[[], bool]
) -> tuple[int, list[str]]:
    """Run a process to its end, or until `give_up`, with its output in the log, secrets blotted out; its status and last lines."""
    hidden = [value for name, value in env.items() if SECRET.search(name) and len(value) >= 8]
    last: deque[str] = deque(maxlen=LAST_LINES)
    with (
        (work / LOG).open("w", encoding="utf-8") as log,
        subprocess.Popen(
            arguments,
            cwd=work,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                for secret in hidden:
                    line = line.replace(secret, "***")
                log.write(line)
                last.append(_CONTROL.sub("", line.rstrip()))
                if found := re.match(r"answered (\d+ of \d+)", line):
                    on_progress(found[1])
                if give_up():
                    process.kill()
        except BaseException:
            process.kill()
            raise
    return process.returncode, list(last)


_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def read_output(out: Path, task: str) -> tuple[Mapping[str, Any], list[Sample]]:
    """A task's entry in lmms-eval's results, and its samples. Raises `DataError` when they aren't there, whole and alone."""
    results, samples = sorted(out.glob("*/*_results.json")), sorted(out.glob(f"*/*_samples_{task}.jsonl"))
    if len(results) != 1 or len(samples) != 1:
        raise DataError(f"{len(results)} results files and {len(samples)} samples files, where one of each belongs")
    try:
        entry = json.loads(results[0].read_text(encoding="utf-8"))["results"][task]
        rows = [json.loads(line) for line in samples[0].read_text(encoding="utf-8").split("\n") if line.strip()]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"its files can't be read: {error!r}") from None
    if not rows:
        raise DataError("no question was asked")
    return entry, rows


def graded(benchmark: Benchmark, settings: Settings, results: Mapping[str, Any], samples: Sequence[Sample], *, judged: int) -> Result:
    """The score of a sample from its questions, held against lmms-eval's own.

    Raises:
        EvaluationError: an answer failed, too few were asked for the score, or the two scores differ.
    """
    texts = [_response(sample) for sample in samples]
    if failed := [text for text in texts if text.startswith(FAILED)]:
        raise EvaluationError(f"{benchmark.name}: {len(failed)} of {len(texts)} answers failed, the first with {failed[0][:200]!r}")
    try:
        parts = benchmark.parts(samples)
        if not all(part.units for part in parts):
            raise EvaluationError(
                f"{benchmark.name}: none of its {len(samples)} questions counts in a part of the score. Ask more: --limit"
            )
        own, theirs = score(parts), reported(benchmark, results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(f"{benchmark.name}: lmms-eval's samples can't be read ({error!r}); the table is of version 0.7.3") from None
    comparable = settings.limit is None or not benchmark.whole
    if comparable and not abs(own - theirs) <= TOLERANCE:
        raise EvaluationError(
            f"{benchmark.name}: lmms-eval reports {theirs:.2f} and its samples have {own:.2f}. They are graded otherwise than in the table "
            "of docs/benchmarks.md, which is of lmms-eval 0.7.3; install that version"
        )
    lengths = [length for sample in samples if (length := _length(sample)) is not None]
    return Result(
        parts,
        len(samples),
        own,
        hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        sum(lengths) / len(lengths) if lengths else None,
        sum(length >= settings.max_tokens for length in lengths) / len(lengths) if lengths else None,
        judged,
    )


def _response(sample: Sample) -> str:
    value = sample.get("resps", sample.get("filtered_resps"))
    while isinstance(value, list) and value:
        value = value[0]
    return str(value)


def _length(sample: Sample) -> int | None:
    counts = sample.get("token_counts") or [None]
    return counts[0].get("output_tokens") if isinstance(counts[0], dict) else None


def finished(folder: Path, settings: Settings) -> Result | None:
    """The sample that is there already; None when it has still to be run.

    Raises:
        CheckpointError: it was made with other settings, or can't be read.
    """
    path = folder / FINISHED
    if not path.exists():
        if folder.exists():
            raise CheckpointError(f"{folder} has no {FINISHED}. Delete the folder; the sample is then run again")
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        before, now = entry["settings"], asdict(settings)
        parts = [Part(part["weight"], {unit: (s, c) for unit, (s, c) in part["units"].items()}) for part in entry["parts"]]
        result = Result(parts, *(entry[key] for key in ("questions", "score", "answers", "tokens", "truncated", "judged")))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged. Delete its folder; the sample is then run again") from None
    if changed := [f"{key} was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value]:
        raise CheckpointError(f"{folder} was evaluated with other settings: {'; '.join(changed)}. Put them back, or give another --out")
    return result
