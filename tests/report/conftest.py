"""A small run folder in the format of docs/run_folder.md, with invented numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from report_browser import CHROMIUM, Browser

STUDENT = {
    "accuracy": 0.418,
    "se": 0.019,
    "blind_degraded": 0.121,
    "blind_removed": 0.1,
    "va": 0.07,
    "va_top10": 0.91,
    "tokens": 39.5,
    "truncated": 0.0,
}
TRAINED = {
    "accuracy": 0.709,
    "se": 0.017,
    "blind_degraded": 0.13,
    "blind_removed": 0.11,
    "va": 0.104,
    "va_top10": 0.92,
    "tokens": 38.2,
    "truncated": 0.01,
}
TEACHER = {
    "accuracy": 0.971,
    "se": 0.006,
    "blind_degraded": 0.129,
    "blind_removed": 0.1,
    "va": 0.31,
    "va_top10": 0.93,
    "tokens": 38.9,
    "truncated": 0.0,
}
GAIN = {"points": 29.1, "low": 25.0, "high": 33.2}
CONFIG = """\
run: runs/demo/{method}
method: {method}
student: world/student
teacher: world/teacher_large
seed: 1
data: {{train: builtin, eval: builtin}}
rollouts: {{k: 4, max_tokens: 64, temperature: 1.0, top_p: 1.0}}
optim: {{lr: 1.0e-4, prompts_per_step: 8, steps: 150}}
eval: {{every: 30, k: 8}}
"""
WORDS = [
    "The",
    " sides",
    " are",
    " {a}",
    ",",
    " {b}",
    " and",
    " {c}",
    ".",
    "\n",
    "Sum",
    ":",
    " {s}",
    ".",
    "\n",
    "Answer",
    ":",
    " {s}",
    "<|im_end|>",
]


def mass_curve() -> dict[str, list[float]]:
    tokens = [i / 100 for i in range(101)]
    return {"tokens": tokens, "mass": [1 - math.exp(-25 * x) if x < 1 else 1.0 for x in tokens]}


def train_row(step: int, rng: random.Random) -> dict[str, Any]:
    decay = math.exp(-step / 60)
    row = {
        "loss": 0.08 + 0.27 * decay,
        "kl": 0.05 + 0.4 * decay,
        "va": 0.1 - 0.03 * decay,
        "va_top10": 0.91,
        "effective_rollouts": 2.4,
        "grad_norm": 1 + 2 * decay,
    }
    noisy = {k: v * (1 + 0.12 * rng.gauss(0, 1)) for k, v in row.items()}
    counts = {"empty": 0, "skipped_prompts": 0, "nonfinite": 0, "seconds": 0.5}
    return {"kind": "train", "step": step, **noisy, "lr": 1e-4 * min(1, step / 8), "tokens": 38 + rng.random(), "truncated": 0.01, **counts}


def eval_row(step: int, gain: float) -> dict[str, Any]:
    accuracy = 0.418 + gain * (1 - math.exp(-step / 50))
    return {
        "kind": "eval",
        "step": step,
        "accuracy": accuracy,
        "se": 0.019,
        "questions": 320,
        "k": 8,
        "tokens": 39.0,
        "truncated": 0.0,
        "va": 0.07 + step / 4000,
    }


def rollout(rng: random.Random, sides: tuple[int, int, int], right: bool) -> dict[str, Any]:
    a, b, c = sides if right else (sides[0], rng.randint(2, 9), sides[2])
    tokens = [w.format(a=a, b=b, c=c, s=a + b + c) for w in WORDS]
    visual = ["{" in w and "s" not in w for w in WORDS]
    va = [rng.uniform(1.0, 5.5) if v else max(0.0, rng.gauss(0, 0.05)) for v in visual]
    teacher = [-0.2 if v else -0.05 for v in visual]
    return {
        "text": "".join(tokens), "correct": right, "ended": True, "weight": round(rng.uniform(0.05, 0.6), 3), "tokens": tokens, "va": va,
        "kl": [rng.uniform(0.2, 2) if v else rng.uniform(0, 0.1) for v in visual], "coefficient": [0.02 if v else 0.005 for v in visual],
        "logp_teacher": teacher, "logp_degraded": [t - x for t, x in zip(teacher, va, strict=True)],
        "logp_student": [-1.1 if v else -0.1 for v in visual],
    }  # fmt: skip


def draw(path: Path, sides: tuple[int, int, int], ratio: float | None = None) -> None:
    image = Image.new("RGB", (64, 64), "#0d1117")
    pen = ImageDraw.Draw(image)
    pen.polygon([(10, 52), (54, 52), (24, 10)], outline="#e8e8e8")
    for value, place in zip(sides, [(28, 53), (44, 24), (8, 24)], strict=True):
        pen.text(place, str(value), fill="#ffd479")
    if ratio:
        small = image.resize((max(1, int(64 * ratio)),) * 2, Image.Resampling.BILINEAR)
        image = small.resize((64, 64), Image.Resampling.NEAREST)
    image.save(path)


def sample_rows(folder: Path, steps: tuple[int, ...], questions: int, k: int, skill: float) -> list[dict[str, Any]]:
    rng = random.Random(3)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    rows = []
    for step in steps:
        for i in range(questions):
            sides = (rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)) if step == steps[0] else tuple(rows[i]["sides"])
            view = {"original": f"samples/q{i}.png", "degraded": f"samples/q{i}_d.png"}
            draw(folder / view["original"], sides)
            draw(folder / view["degraded"], sides, 0.1)
            chance = 0.4 if step == steps[0] else skill
            rollouts = [rollout(rng, sides, rng.random() < chance) for _ in range(k)]
            rows.append(
                {
                    "step": step,
                    "id": f"q{i}",
                    "problem": "<image>\nWhat is the perimeter?",
                    "answer": str(sum(sides)),
                    "images": [view],
                    "rollouts": rollouts,
                    "sides": sides,
                }
            )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(
    folder: Path, *, method: str = "va_opd", steps: int = 150, questions: int = 3, k: int = 3, gain: float = 0.29, skill: float = 0.8
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(method)
    (folder / "config.yaml").write_text(CONFIG.format(method=method), encoding="utf-8")
    evals = [eval_row(step, gain) for step in range(0, steps + 1, 30)]
    write_rows(folder / "metrics.jsonl", [evals[0], *(train_row(s, rng) for s in range(1, steps + 1)), *evals[1:]])
    write_rows(folder / "samples.jsonl", sample_rows(folder, (0, steps // 2, steps), questions, k, skill))
    trained = TRAINED | {"accuracy": 0.418 + gain + 0.001}
    result = {
        "questions": 320,
        "k": 8,
        "models": {"student": STUDENT, "trained": trained, "teacher": TEACHER},
        "gain": GAIN,
        "mass_curve": mass_curve(),
    }
    (folder / "eval.json").write_text(json.dumps(result), encoding="utf-8")
    train = {"rows": 2060, "used": 2051, "skipped": {"image <b>missing</b>": 9}}
    account = {"files": {"train": train, "test": {"rows": 320, "used": 320, "skipped": {}}}, "left_out": 3}
    (folder / "data.json").write_text(json.dumps(account), encoding="utf-8")
    return folder


def make_study(folder: Path) -> Path:
    make_run(folder / "opd", method="opd")
    make_run(folder / "va_opd", method="va_opd", gain=0.301, skill=0.85)
    models = {
        "student": STUDENT,
        "opd": TRAINED,
        "va_opd": TRAINED | {"accuracy": 0.72, "va": 0.14, "blind_degraded": 0.126},
        "teacher": TEACHER,
    }
    gains = {"opd": GAIN, "va_opd": {"points": 30.2, "low": 26.0, "high": 34.4}}
    summary = {"name": "demo", "models": models, "gains": gains, "mass_curve": mass_curve(), "seconds": 231}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; not to be changed by tests."""
    return make_run(tmp_path_factory.mktemp("run") / "mine")


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two cells with one seed each; not to be changed by tests."""
    return make_study(tmp_path_factory.mktemp("study") / "demo")


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder of the test's own."""
    return lambda name="own", **settings: make_run(tmp_path / name, **settings)


@pytest.fixture
def new_study(tmp_path: Path) -> Callable[[], Path]:
    """A study folder of the test's own."""
    return lambda: make_study(tmp_path / "study")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless Chromium for all tests; without it (Debian: `apt install chromium`) the tests that need it are skipped."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    tab = Browser()
    yield tab
    tab.close()
