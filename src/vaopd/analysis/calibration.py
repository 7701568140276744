"""The calibration table of the built-in world (docs/world.md), from positive controls alone.

`python -m vaopd.analysis.calibration FULL HALF` reads two studies of OPD, with all steps and with half of them, takes the built-in
models' answers apart, and prints the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaopd.analysis.dissect import dissect_model
from vaopd.analysis.statistics import Estimate, mean_interval, standard_error, t_quantile

MODELS = ("student", "student-arithmetic", "student-both", "teacher-s", "teacher-m", "teacher")
SEEDS = (4, 8, 16)


def accuracies(study: Path) -> dict[int, float]:
    """Accuracy in percent at the end of every run of a study of one method, by seed."""
    found = {}
    for path in study.glob("opd-seed*/eval.json"):
        seed = int(path.parent.name.removeprefix("opd-seed"))
        found[seed] = 100 * json.loads(path.read_text(encoding="utf-8"))["models"]["trained"]["accuracy"]
    return dict(sorted(found.items()))


def controls(full: Mapping[int, float], half: Mapping[int, float]) -> dict[str, Estimate]:
    """Positive controls, in points: where OPD ends, two sets of its seeds against one another (nothing differs), half the steps.

    Raises:
        ValueError: an odd number of runs, which has no two halves, or a run of half the steps whose seed has no run of all of them.
    """
    if len(full) % 2 or not full or not half or half.keys() - full.keys():
        raise ValueError(
            f"the controls need an even number of runs, and half the steps on seeds of those; found seeds {sorted(full)} and {sorted(half)}"
        )
    ends, middle = list(full.values()), len(full) // 2
    return {
        "OPD, all steps": mean_interval(ends),
        "OPD, half the steps": mean_interval(list(half.values())),
        "OPD minus OPD, other seeds": mean_interval([b - a for a, b in zip(ends[:middle], ends[middle:], strict=True)]),
        "all steps minus half, same seeds": mean_interval([full[seed] - end for seed, end in half.items()]),
    }


def visible(full: Sequence[float], seeds: int) -> float:
    """The half-width of the 95 % interval of a paired difference of two methods that vary as OPD does between seeds, in points.

    A difference larger than that is visible with so many seeds. Pairing by seed shares prompts and sampling noise, which can only make
    the differences vary less than the independent runs that are assumed here.
    """
    deviation = (standard_error(full) or 0.0) * len(full) ** 0.5
    return t_quantile(0.975, seeds - 1) * (2 / seeds) ** 0.5 * deviation


def table(models: Mapping[str, Mapping[str, Any]], full: Mapping[int, float], half: Mapping[int, float]) -> str:
    """All of it as Markdown."""
    lines = ["| model | parameters | right, % | labels read, % | follows from what was read, % |", "|---|---|---|---|---|"]
    for name, m in models.items():
        right = f"{100 * m['accuracy']:.1f} ± {196 * m['se']:.1f}"
        lines.append(f"| `builtin:{name}` | {m['parameters']:,} | {right} | {100 * m['digits']:.1f} | {100 * m['follows']:.1f} |")
    lines += ["", "| control | points | 95 % interval | runs |", "|---|---|---|---|"]
    for name, e in controls(full, half).items():
        lines.append(f"| {name} | {e.mean:.1f} | {e.low:.1f} to {e.high:.1f} | {e.n} |")
    lines += ["", "| seeds of a comparison | " + " | ".join(map(str, SEEDS)) + " |", "|---|" + "---|" * len(SEEDS)]
    lines.append("| smallest visible difference, points | " + " | ".join(f"{visible(list(full.values()), n):.1f}" for n in SEEDS) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Print the calibration table of the built-in world.")
    parser.add_argument("full", type=Path, help="study of OPD")
    parser.add_argument("half", type=Path, help="the same with half the steps")
    parser.add_argument("--questions", type=int, default=1000)
    arguments = parser.parse_args()
    models = {name: dissect_model(f"builtin:{name}", questions=arguments.questions, k=4) for name in MODELS}
    print(table(models, accuracies(arguments.full), accuracies(arguments.half)))


if __name__ == "__main__":
    main()
