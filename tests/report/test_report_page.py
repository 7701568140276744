"""The page from run folders: the numbers on it, what it says about missing and torn files, its size, and hostile content."""

from __future__ import annotations

import html
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from report_hostile import HOSTILE, poison, rows_of

from vaopd.errors import DataError
from vaopd.report import write_comparison, write_report
from vaopd.report.figures import CURVES, accuracy, closed, gain_text, group_runs, label, nats, percent, rows_used, series
from vaopd.report.page import PAGE_BYTES
from vaopd.report.read import group_name, read_metrics, read_run
from vaopd.report.seeds import t95


def page_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, in one line: without style, script and tags."""
    bare = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def test_numbers() -> None:
    assert percent(0.418) == "41.8"
    assert percent(None) == percent(float("nan")) == percent("x") == "–"
    assert accuracy({"accuracy": 0.418, "se": 0.019}) == "41.8 ± 1.9"
    assert accuracy({"accuracy": 0.5, "se": None}) == "50.0"
    assert nats(0.07) == "0.070"
    assert nats(1.234) == "1.23"
    assert nats(0.00077) == "0.00077"
    assert nats(0) == "0.000"
    assert label("va_opd-seed2") == "VA-OPD, seed2"
    assert gain_text({"points": 29.1, "low": 25.0, "high": 33.2}) == "+29.1 [25.0, 33.2]"
    assert gain_text({"points": -1.25, "low": -3.0, "high": 0.5}) == "−1.2 [−3.0, 0.5]"
    assert gain_text({}) == "–"
    models = {"student": {"accuracy": 0.4}, "trained": {"accuracy": 0.7}, "teacher": {"accuracy": 1.0}}
    assert closed(models, "trained") == pytest.approx(0.5)
    assert closed(models | {"teacher": {"accuracy": 0.3}}, "trained") is None


def test_a_run_shows_its_numbers(run_folder: Path, tmp_path: Path) -> None:
    page = page_of(write_report(run_folder, tmp_path / "page.html"))
    text = text_of(page)
    for expected in (
        "41.8 ± 1.9",
        "70.9 ± 1.7",
        "97.1 ± 0.6",
        "+29.1",
        "95 % interval [25.0, 33.2]",
        "320 questions, 8 answers each",
        "VA-OPD",
        "world/teacher_large",
        "52.6 % of the distance to the teacher",
        "top 10 % of tokens: 91.8 % of the mass",
        "optim.lr 0.0001",
        "Rows that were not used:",
        "train: 9 × image <b>missing</b>",
        "train: 3 × asks a held-out question",
    ):
        assert expected in text, expected
    for title in (
        "Held-out accuracy",
        "Loss",
        "KL to the teacher",
        "Response length",
        "Effective rollouts",
        "Gradient norm",
        "Learning rate",
    ):
        assert f"<b>{title}</b>" in page
    assert "Shown: 3 of 3 questions from the first and the last of 3 evaluations, 18 rollouts." in text
    assert "remark" not in text


def test_every_token_of_the_shown_rollouts_is_a_span(run_folder: Path, tmp_path: Path) -> None:
    page = page_of(write_report(run_folder, tmp_path / "page.html"))
    rows = [r for r in rows_of(run_folder / "samples.jsonl") if r["step"] in (0, 150)]
    tokens = sum(len(r["tokens"]) for row in rows for r in row["rollouts"])
    assert len(re.findall(r'<span class="v\d+ k\d+" title="VA ', page)) == tokens


def test_correctness_is_said_in_words(run_folder: Path, tmp_path: Path) -> None:
    page = page_of(write_report(run_folder, tmp_path / "page.html"))
    rollouts = [r for row in rows_of(run_folder / "samples.jsonl") if row["step"] != 75 for r in row["rollouts"]]
    assert page.count("✓ correct</b>") == sum(r["correct"] for r in rollouts)
    assert page.count("✗ wrong</b>") == sum(not r["correct"] for r in rollouts)


def test_the_page_is_self_contained_and_the_same_each_time(run_folder: Path, tmp_path: Path) -> None:
    first = page_of(write_report(run_folder, tmp_path / "a.html"))
    assert first == page_of(write_report(run_folder, tmp_path / "b.html"))
    assert not re.search(r'(?:src|href)="(?!data:image/|#)', first)
    assert "default-src &#39;none&#39;" in first or "default-src 'none'" in first
    assert "unsafe-inline" not in first
    assert not list(tmp_path.glob(".*"))


def test_without_out_the_page_lies_in_the_folder(new_run: Callable[..., Path]) -> None:
    run = new_run()
    assert write_report(str(run)) == run / "report.html"


def test_names_and_reasons_of_rows_that_were_not_used_show_what_they_hide() -> None:
    files = {"train\u202e": {"rows": 5, "used": 2, "skipped": {"bad\u202etxt": 3}}, "test": "no mapping"}
    assert rows_used({"files": files, "left_out": 1}) == (
        "2 of 5",
        ["train⟨U+202E⟩: 3 × bad⟨U+202E⟩txt", "train: 1 × asks a held-out question with the same pictures"],
    )
    assert rows_used({}) == ("–", [])


def test_a_torn_last_line_is_left_out_and_mentioned(new_run: Callable[..., Path]) -> None:
    run = new_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 151, "lo')
    text = text_of(page_of(write_report(run)))
    assert "metrics.jsonl: the last line is torn" in text
    assert "run rows of data used steps steps not applied" in text
    assert "own 2,371 of 2,380 ⚠ 150 0 0 0 1.0 % 1 min 15 s" in text


def test_unreadable_and_repeated_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        '{"kind":"train","step":1,"loss":9}',
        "nonsense",
        '{"kind":"train","step":1,"loss":2}',
        "[1]",
        '{"kind":"train"}',
        "[" * 100_000,
        '{"step":1e400}',
    ]
    path.write_text("\n".join(rows) + "\n")
    notes: list[str] = []
    train, evals = read_metrics(path, notes)
    assert [row["loss"] for row in train] == [2]
    assert evals == []
    assert "metrics.jsonl: 5 unreadable line(s) left out (line 2, 4, 5, 6, 7)." in notes
    assert any("1 row(s) were written twice" in note for note in notes)


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "eval.json", "samples.jsonl", "samples"])
def test_a_missing_file_is_said_not_raised(new_run: Callable[..., Path], missing: str) -> None:
    run = new_run()
    if missing == "samples":
        for picture in (run / "samples").iterdir():
            picture.unlink()
        assert page_of(write_report(run)).count("no picture") == 6
    else:
        (run / missing).unlink()
        assert f"{missing} is not there (yet)." in text_of(page_of(write_report(run)))


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("method: va_opd\n")
    text = text_of(page_of(write_report(tmp_path / "run")))
    assert "There is no final evaluation yet" in text
    assert "There is nothing to draw yet" in text
    assert "There are no rollouts to show" in text


def test_nulls_everywhere(new_run: Callable[..., Path]) -> None:
    run = new_run()
    for name in ("metrics.jsonl", "samples.jsonl"):
        keep = ("kind", "step", "id", "rollouts", "tokens")
        rows = [{k: v if k in keep else None for k, v in row.items()} for row in rows_of(run / name)]
        for rollout in (r for row in rows for r in row.get("rollouts") or []):
            rollout |= {k: None for k in rollout if k != "tokens"}
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((run / "eval.json").read_text())
    result["models"] = {m: dict.fromkeys(values) for m, values in result["models"].items()} | {"trained": {}}
    (run / "eval.json").write_text(json.dumps(result | {"gain": None, "mass_curve": None, "k": None}))
    text = text_of(page_of(write_report(run)))
    assert "not graded" in text
    assert "no mass_curve was measured" in text
    assert "No token here has a visual advantage" in text


@pytest.mark.parametrize(
    "value", ["7", '"x"', "[]", "{}", "[1, {}]", '{"models": [], "gain": 3, "mass_curve": {"tokens": 3, "mass": "x"}}', "{", "NaN"]
)
def test_files_of_the_wrong_shape(new_run: Callable[..., Path], value: str) -> None:
    run = new_run(questions=1)
    for name in ("eval.json", "config.yaml"):
        (run / name).write_text(value)
    row = {
        "step": 1,
        "id": [],
        "problem": {},
        "answer": [],
        "images": value,
        "rollouts": [value, {"tokens": [1, None, {}], "va": {"a": 1}}],
    }
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"rollouts": 3, "id": 3, "images": [3]}) + "\n")
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": value, "kl": 1e300, "nonfinite": "x"}) + "\n")
    assert "Rollouts" in text_of(page_of(write_report(run)))


def test_nonfinite_and_dropped_are_reported(new_run: Callable[..., Path]) -> None:
    run = new_run()
    rows = rows_of(run / "metrics.jsonl")
    for row in rows:
        if row["kind"] == "train":
            row |= {
                "nonfinite": int(row["step"] in (12, 57)),
                "empty": 1 if row["step"] == 3 else 0,
                "skipped_prompts": 2 if row["step"] == 4 else 0,
            }
            row |= {"loss": float("nan")} if row["step"] == 12 else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = text_of(page_of(write_report(run)))
    assert "own 2,371 of 2,380 ⚠ 150 2 (step 12, 57) ⚠ 1 ⚠ 2 ⚠ 1.0 %" in text


def test_large_inputs_stay_under_the_limit_and_say_what_is_left_out(new_run: Callable[..., Path]) -> None:
    run = new_run(steps=60, questions=1)
    base = rows_of(run / "samples.jsonl")[0]
    Image.effect_noise((448, 448), 90).convert("RGB").save(run / "samples/noise.png")
    images = [{"original": "samples/noise.png", "degraded": "samples/q0_d.png"}]
    middle, long = ({k: v * times if isinstance(v, list) else v for k, v in base["rollouts"][0].items()} for times in (20, 50))
    with (run / "samples.jsonl").open("w") as file:
        for step, i in itertools.product((0, 60), range(15)):
            rollouts = [long if i == 0 else middle, *[middle] * 8]
            file.write(json.dumps(base | {"step": step, "id": f"n{i}", "images": images, "rollouts": rollouts}) + "\n")
    page = page_of(write_report(run))
    text = text_of(page)
    assert PAGE_BYTES / 4 < len(page.encode()) <= PAGE_BYTES
    shown = re.search(r"Shown: (\d+) of 15 questions", text)
    assert shown is not None
    assert 1 <= int(shown[1]) < 15
    assert "2 more rollouts of this question are not shown." in text
    assert "… 150 more tokens are not shown." in text


def test_foreign_text_is_escaped_and_spelled_out(new_run: Callable[..., Path]) -> None:
    run = new_run(f"{HOSTILE[1][:30]}".replace("/", ""))
    poison(run)
    page = page_of(write_report(run))
    assert page.count("<script>") == 1
    assert "<img src=x" not in page
    assert not set(page) & set("\u202e\x00\x07\x1b")
    assert "⟨U+202E⟩gnp.exe" in page
    assert "{{ 7*7 }}" in page
    assert "(+19,920 characters)" in page


def test_a_study_shows_its_cells_side_by_side(study_folder: Path, tmp_path: Path) -> None:
    page = page_of(write_comparison(study_folder, tmp_path / "study.html"))
    text = text_of(page)
    for expected in (
        "OPD 70.9 ± 1.7 +29.1 [25.0, 33.2]",
        "VA-OPD 72.0 ± 1.7 +30.2 [26.0, 34.4]",
        "student 41.8 ± 1.9",
        "teacher 97.1 ± 0.6",
        "One seed is no verdict",
        "student (step 0)",
        "OPD (step 150)",
        "VA-OPD (step 150)",
        "3 min 51 s",
        "method opd va_opd",
    ):
        assert expected in text, expected
    loss = re.search(r"<svg[^>]*train-loss-title.*?</svg>", page, flags=re.S)
    assert loss is not None
    assert all(f'class="line c{i}"' in loss[0] for i in (0, 1))


def test_a_study_without_summary_uses_the_cells_own_evaluations(new_study: Callable[[], Path]) -> None:
    study = new_study()
    (study / "summary.json").unlink()
    text = text_of(page_of(write_report(study)))
    assert "summary.json is not there (yet)." in text
    assert "VA-OPD 72.0 ± 1.7 +29.1 [25.0, 33.2]" in text


def test_seeds_of_one_method_become_one_line_with_their_spread(new_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [read_run(new_run(f"study/opd/seed_{i}", gain=g), f"opd/seed_{i}") for i, g in enumerate((0.2, 0.3), 1)]
    groups = group_runs(runs)
    line = series(groups[0], CURVES[0])
    assert [g.label for g in groups] == ["OPD"]
    assert line.y[0] == pytest.approx(41.8)
    assert line.se[0] == pytest.approx(0)
    assert line.se[-1] == pytest.approx(10 * (1 - 2.718281828 ** (-3)) / 2, rel=1e-3)
    text = text_of(page_of(write_comparison(tmp_path / "study")))
    assert "2 seeds" in text
    assert "One seed is no verdict" not in text


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("va_opd/seed_1", "va_opd"),
        ("opd-s3", "opd"),
        ("opd_seed12", "opd"),
        ("seed_1", "seed_1"),
        ("va_opd", "va_opd"),
        ("lr3", "lr3"),
        ("losses2", "losses2"),
        ("opd-seed12", "opd"),
    ],
)
def test_a_cell_name_without_its_seed(name: str, group: str) -> None:
    assert group_name(name) == group


def test_several_runs_side_by_side(new_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [new_run("a/run", method="opd"), new_run("b/run", method="opd", gain=0.1)]
    text = text_of(page_of(write_report(runs, tmp_path / "out")))
    assert (tmp_path / "out/report.html").is_file()
    assert "a/run 70.9" in text
    assert "b/run 51.9" in text


def test_what_cannot_be_reported_is_an_error_that_says_the_fix(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(DataError, match="neither a run"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="say where"):
        write_report([run_folder, run_folder])
    with pytest.raises(DataError, match="none was given"):
        write_report([])


def test_the_report_does_not_load_torch() -> None:
    code = "import sys, vaopd.report; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods_are_compared_by_seed(new_run: Callable[..., Path], tmp_path: Path) -> None:
    for method, shift in (("opd", 0.0), ("va_opd", 0.01)):
        for seed, extra in enumerate((0.0, 0.02, 0.0)):
            new_run(
                f"study/{method}-seed{seed}",
                method=method,
                gain=0.2 + shift + extra + (0.01 if method == "va_opd" and seed == 1 else 0),
                questions=1,
                k=1,
            )
    text = text_of(page_of(write_comparison(tmp_path / "study")))
    # by hand: accuracies 61.9, 63.9, 61.9 and 62.9, 65.9, 62.9; differences 1, 2, 1: mean 4/3, se 1/3, t(2) = 4.303
    assert "OPD, mean of 3 seeds 62.6 ± 0.7" in text
    assert "VA-OPD, mean of 3 seeds 63.9 ± 1.0" in text
    assert "VA-OPD minus OPD, 3 seeds paired" in text
    assert "+1.3 [−0.1, 2.8]" in text
    assert "VA-OPD minus OPD, 3 seeds paired: the interval includes zero" in text
    assert "OPD, seed1 63.9" in text


def test_t_quantiles() -> None:
    assert [round(t95(n), 2) for n in (1, 2, 10)] == [12.71, 4.30, 2.23]
    assert 2.201 <= t95(11) < 2.21
    assert 2.042 <= t95(30) < 2.06
