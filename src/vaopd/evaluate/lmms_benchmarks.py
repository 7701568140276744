"""The paper's eight benchmarks in lmms-eval 0.7.3: the task, the rule, and the score of each question from the samples that it logs.

lmms-eval's own standard errors treat the parts of a composite as independent and know no clusters, and some of its aggregates can't be
taken apart (WeMath, HallusionBench). So the logged samples are scored here, question by question, and the mean of these must be the
number that lmms-eval reports (`lmms_run`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vaopd.errors import ConfigError, DataError, did_you_mean

VERSION = "0.7.3"  # of lmms-eval, whose tasks and metric names these are
Sample = Mapping[str, Any]  # a line of lmms-eval's samples file


@dataclass(frozen=True)
class Part:
    """A mean over units (questions, figures, problems), and its weight in the benchmark's score."""

    weight: float
    units: Mapping[str, tuple[float, str]]  # unit -> its score from 0 to 1, and the cluster that it is drawn with

    @property
    def mean(self) -> float:
        return sum(score for score, _ in self.units.values()) / len(self.units)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as lmms-eval runs it."""

    name: str
    task: str  # lmms-eval's name of it
    rule: str  # for people
    parts: Callable[[Sequence[Sample]], list[Part]]
    metrics: Mapping[str, float]  # lmms-eval's metric -> its weight in the score in percent
    source: str = ""  # where lmms-eval has the rule
    judged: bool = False  # by a model behind an endpoint
    math: bool = False  # of the paper's two groups: mathematics, or else visual understanding
    whole: bool = False  # lmms-eval divides by the number of questions in the whole benchmark, whatever was asked
    ours: bool = False  # the task's file is in lmms_tasks/


def score(parts: Iterable[Part]) -> float:
    """In percent."""
    return 100 * sum(part.weight * part.mean for part in parts)


def standard_error(parts: Sequence[Part]) -> float:
    """Of `score`, in percentage points, over clusters; NaN with fewer than two.

    Each part is a ratio of sums over clusters, so their weighted sum is linearised: a cluster's influence is the sum of what its units
    deviate from the means of their parts (Woodruff, JASA 1971). With one part and clusters of one unit it is std / sqrt(n).
    """
    influence: dict[str, float] = defaultdict(float)
    for part in parts:
        for value, cluster in part.units.values():
            influence[cluster] += part.weight * (value - part.mean) / len(part.units)
    count = len(influence)
    return 100 * math.sqrt(count / (count - 1) * sum(x * x for x in influence.values())) if count > 1 else math.nan


def average(samples: Sequence[Sequence[Part]]) -> list[Part]:
    """The parts with each unit's mean over k samples: `score` of it is avg@k. Raises `DataError` when the samples' units differ."""
    first = samples[0]
    for other in samples[1:]:
        if [(part.weight, part.units.keys()) for part in other] != [(part.weight, part.units.keys()) for part in first]:
            raise DataError(
                "two samples of one benchmark have different questions: its data changed in between. "
                "Give another --out, or delete the folder of the older ones"
            )
    return [
        Part(part.weight, {u: (sum(s[i].units[u][0] for s in samples) / len(samples), cluster) for u, (_, cluster) in part.units.items()})
        for i, part in enumerate(first)
    ]


def reported(benchmark: Benchmark, results: Mapping[str, Any]) -> float:
    """lmms-eval's own score in percent, from a task's entry in its results file.

    Raises:
        DataError: it lacks a metric; names those that it has.
    """
    values = {key.partition(",")[0]: value for key, value in results.items() if "_stderr" not in key}
    if missing := [name for name in benchmark.metrics if name not in values]:
        there = ", ".join(sorted(str(name) for name in values if name not in ("alias", "samples")))
        raise DataError(f"lmms-eval's results of task {benchmark.task} have no metric {missing[0]!r}; they have: {there}")
    return sum(weight * _number(values[name]) for name, weight in benchmark.metrics.items())


def _number(value: Any) -> float:
    """WeMath's are texts like '46.67%'; MathVista's mean of no right answer is None."""
    return 0.0 if value is None else float(value.rstrip("%")) if isinstance(value, str) else float(value)


def _plain(value: Callable[[Sample], float], cluster: Callable[[Sample], Any] | None = None) -> Callable[[Sequence[Sample]], list[Part]]:
    """One part, one unit for each question."""

    def parts(samples: Sequence[Sample]) -> list[Part]:
        units = {str(s["doc_id"]): (float(value(s)), str(cluster(s) if cluster else s["doc_id"])) for s in samples}
        return [Part(1.0, units)]

    return parts


def _mmstar(samples: Sequence[Sample]) -> list[Part]:
    """The mean over the eighteen sub-categories of their means."""
    units: dict[str, dict[str, tuple[float, str]]] = defaultdict(dict)
    for sample in samples:
        entry = sample["average"]
        units[entry["l2_category"]][str(sample["doc_id"])] = (float(entry["score"]), str(sample["doc_id"]))
    return [Part(1 / len(units), units[name]) for name in sorted(units)]


def _hallusion(samples: Sequence[Sample]) -> list[Part]:
    """The judge's verdicts, which lmms-eval leaves in the samples; questions without a figure count in no figure."""
    rows = [(sample["doc_id"], sample["aAcc"]) for sample in samples]
    with_figure = [(i, row) for i, row in rows if not (row["category"] == "VS" and str(row["figure_id"]) == "0")]
    return _hallusion_parts([(i, row, bool(row["correct"])) for i, row in rows], [(i, row, bool(row["correct"])) for i, row in with_figure])


def _hallusion_by_rule(samples: Sequence[Sample]) -> list[Part]:
    rows = [(sample["doc_id"], sample["aAcc"]) for sample in samples]
    graded = [(i, row, ("1" if "yes" in row["model_prediction"].lower() else "0") == str(row["gt_answer"])) for i, row in rows]
    return _hallusion_parts(graded, graded)


Graded = tuple[Any, Mapping[str, Any], bool]


def _hallusion_parts(questions: Sequence[Graded], in_figures: Sequence[Graded]) -> list[Part]:
    """Accuracy over questions, over figures with all questions right, and over questions right for all of their figures."""

    def together(rows: Sequence[Graded], key: str) -> dict[str, tuple[float, str]]:
        units: dict[str, tuple[float, str]] = {}
        for _, row, right in rows:
            unit = "_".join((_set(row), str(row[key])))
            units[unit] = (min(float(right), units.get(unit, (1.0, ""))[0]), _set(row))
        return units

    all_questions = {str(i): (float(right), _set(row)) for i, row, right in questions}
    return [Part(1 / 3, units) for units in (all_questions, together(in_figures, "figure_id"), together(questions, "question_id"))]


def _set(row: Mapping[str, Any]) -> str:
    """A picture with its variants and all their questions."""
    return "_".join(str(row[key]) for key in ("category", "subcategory", "set_id"))


def _wemath(samples: Sequence[Sample]) -> list[Part]:
    """A problem earns 1 when it and its steps are solved (strict: all of them; loose: any), 1/2 when only its steps are."""
    problems: dict[str, dict[str, bool]] = defaultdict(dict)
    for sample in samples:
        row = sample["wemath_loose"]
        if row["key"] in _STEPS:
            problems[str(row["ID"])][row["key"]] = row["acc_score"] == 1.0
    strict: dict[str, tuple[float, str]] = {}
    loose: dict[str, tuple[float, str]] = {}
    for problem, right in problems.items():
        steps = [value for key, value in right.items() if not key.endswith("multi")]
        solved = any(value for key, value in right.items() if key.endswith("multi"))
        generalises = 0.0 if solved or not all(steps) else 0.5
        strict[problem] = (float(solved and all(steps)) or generalises, problem)
        loose[problem] = (float(solved and any(steps)) or generalises, problem)
    return [Part(0.5, strict), Part(0.5, loose)]


_STEPS = {f"{n}steps_{step}" for n in (2, 3) for step in (*range(1, n + 1), "multi")}


def _mmmu(sample: Sample) -> float:
    """As in MMMU's own evaluation: the letter, or one of the candidates read from an open answer."""
    entry = sample["mmmu_acc"]
    gold = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    if entry["question_type"] == "multiple-choice":
        return float(any(given in gold for given in entry["parsed_pred"]))
    wanted = [form for answer in gold for form in _normalised(str(answer))]
    return float(any(_open_match(given, wanted) for candidates in entry["parsed_pred"] for given in candidates))


def _open_match(given: str | float, wanted: Sequence[str | float]) -> bool:
    return any(isinstance(w, str) and w in given for w in wanted) if isinstance(given, str) else given in wanted


def _normalised(text: str) -> list[str | float]:
    """A number to two decimals, a lower-case text, or a letter that stands alone."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


HALLUSION = {"aAcc": 1 / 3, "fAcc": 1 / 3, "qAcc": 1 / 3}
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "wemath",
            "wemath_testmini_reasoning",
            "(strict + loose) / 2 over problems of several steps",
            _wemath,
            {"wemath_strict": 0.5, "wemath_loose": 0.5},
            "wemath/reasoning/utils.py, wemath/wemath_utils.py",
            math=True,
            whole=True,
        ),
        Benchmark(
            "mathvista",
            "mathvista_testmini_format",
            "the judge extracts the answer, then exact match",
            _plain(lambda sample: sample["llm_as_judge_eval"]["true_false"]),
            {"llm_as_judge_eval": 1.0},
            "mathvista/utils.py, mathvista/mathvista_evals.py",
            judged=True,
            math=True,
        ),
        Benchmark(
            "mathverse",
            "mathverse_testmini",
            "the judge compares with the answer",
            # The versions of a problem, from text dominant to vision only, are one problem.
            _plain(lambda sample: sample["gpt_eval_score"], lambda sample: sample["submission"]["problem_index"]),
            {"gpt_eval_score": 100.0},
            "mathverse/utils.py, mathverse/mathverse_evals.py",
            judged=True,
            math=True,
        ),
        Benchmark(
            "hallusionbench",
            "hallusion_bench_image",
            "(aAcc + fAcc + qAcc) / 3, the judge compares with the answer",
            _hallusion,
            HALLUSION,
            "hallusion_bench/evaluate_hb.py, hallusion_bench/utils.py",
            judged=True,
        ),
        Benchmark(
            "ai2d",
            "ai2d",
            "the letter, exactly",
            _plain(lambda sample: sample["exact_match"]),
            {"exact_match": 100.0},
            "ai2d/ai2d.yaml, ai2d/utils.py",
        ),
        Benchmark(
            "mmmu",
            "mmmu_val",
            "the letter or the open answer, found by rule",
            _plain(_mmmu),
            {"mmmu_acc": 100.0},
            "mmmu/utils.py",
        ),
        Benchmark(
            "mmstar",
            "mmstar",
            "the letter, found by rule; mean over sub-categories",
            _mmstar,
            {"average": 100.0},
            "mmstar/utils.py",
        ),
        Benchmark(
            "ocrbench",
            "ocrbench",
            "the answer is in the response; final score / 10",
            _plain(lambda sample: sample["ocrbench_accuracy"]["score"]),
            {"ocrbench_accuracy": 100.0},
            "ocrbench/utils.py",
            whole=True,
        ),
    )
}
# Benchmarks with a judge that also have a rule in lmms-eval.
BY_RULE = {
    "hallusionbench": Benchmark(
        "hallusionbench",
        "hallusion_bench_image_rule",
        "(aAcc + fAcc + qAcc) / 3, 'yes' in the response or not",
        _hallusion_by_rule,
        {name: 100 * weight for name, weight in HALLUSION.items()},
        "hallusion_bench/evaluate_hb.py (hb_aggregation_result_intern)",
        ours=True,
    )
}


def chosen(names: Sequence[str], *, judge: bool) -> list[Benchmark]:
    """The benchmarks of a command line: names of the table, or TASK=METRIC for any other task of lmms-eval.

    Raises:
        ConfigError: an unknown name, or one name twice; a benchmark that only a judge can grade, without one.
    """
    found, refused = [], []
    for name in dict.fromkeys(names):
        task, is_own, metric = name.partition("=")
        if is_own:
            found.append(_own(task, metric))
        elif name not in BENCHMARKS:
            raise ConfigError(
                f"no benchmark '{name}'.{did_you_mean(name, BENCHMARKS)} There are: {', '.join(BENCHMARKS)}. "
                "Any other task of lmms-eval is TASK=METRIC"
            )
        elif judge or not BENCHMARKS[name].judged:
            found.append(BENCHMARKS[name])
        elif name in BY_RULE:
            found.append(BY_RULE[name])
        else:
            refused.append(name)
    if twice := [b.name for i, b in enumerate(found) if b.name in [other.name for other in found[:i]]]:
        raise ConfigError(f"'{twice[0]}' is in --tasks twice, with different metrics. Evaluate it in two folders")
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: graded by a judge, and none was given. Give --judge-url and --judge-model "
            f"(any OpenAI-compatible server), or leave them out of --tasks"
        )
    return found


def _own(task: str, metric: str) -> Benchmark:
    """A task outside the table: the mean of a metric that is a number, or has one as its `score`."""
    if not re.fullmatch(r"\w[\w.-]*", task) or not metric:
        raise ConfigError(f"'{task}={metric}': a task outside the table is TASK=METRIC, as in my_task=exact_match")

    def value(sample: Sample) -> float:
        if metric not in sample:
            raise DataError(f"the samples of task {task} have no metric {metric!r}; they have: {', '.join(sorted(sample))}")
        entry = sample[metric]
        return float(entry["score"] if isinstance(entry, Mapping) else entry)

    return Benchmark(task, task, f"mean of {metric}", _plain(value), {metric: 100.0})
