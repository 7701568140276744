"""The page of a study: its numbers, its size with hundreds of runs, and what it does with torn and hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_browser import Browser
from report_hostile import HOSTILE
from test_report_page import page_of, text_of

from vaopd.report import write_report
from vaopd.report.page import PAGE_BYTES
from vaopd.report.plots import Series, trail_plot
from vaopd.report.study import is_study, mean_curve, method_colours, method_label, significance

MEASURED = {"blind_degraded": 0.12, "blind_removed": 0.05, "va": 0.08, "student_va": -0.03, "kl": 0.31, "tokens": 32.0, "seconds": 88.0}


def run(method: str, seed: int, accuracy: float, *, regime: str | None = None, student: str = "s", **changes) -> dict:
    curve = [[step, accuracy - 0.2 + step / 1000, 0.07 + step / 10000, 0.5, step / 2] for step in range(0, 201, 50)]
    place = {"regime": regime, "student": student, "teacher": "T", "train_size": None}
    row = {
        "kind": "cell",
        "phase": "comparison",
        "name": f"{method}-{regime}-{student}-seed{seed}",
        "method": method,
        **place,
        "seed": seed,
    }
    return row | {"lr": 3e-4, "accuracy": accuracy, "se": 0.01, "curve": curve, **MEASURED} | changes


def comparison(method: str, mean: float, *, regime: str | None = None, **changes) -> dict:
    place = {"regime": regime, "teacher": "T", "train_size": None, "method": method, "baseline": "opd"}
    points = {"mean": mean, "low": mean - 1.5, "high": mean + 1.5, "n": 3}
    pairs = [["s", seed, mean + seed - 1] for seed in range(3)]
    until = {"of": 3, "reached": 2, "step": 75.0, "seconds": 41.0, "baseline_step": 150.0, "baseline_seconds": 60.0}
    tested = {"p": 0.25, "smallest_p": 0.25, "holm": 0.5, "pairs": pairs, "per_student": [], "over_students": None}
    return place | {"points": points, "until_baseline": until, **tested} | changes


def means(method: str, accuracy: float, *, regime: str | None = None, **changes) -> dict:
    place = {"regime": regime, "teacher": "T", "train_size": None, "method": method, "student": None, "runs": 3, "lr": [3e-4]}
    estimate = {"mean": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02, "n": 3}
    return place | {"accuracy": estimate, "effective_rollouts": 2.4, **MEASURED} | changes


def make(folder: Path, rows: list[dict], **summary) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    axes = {"methods": ["opd", "va_opd"], "seeds": [0, 1, 2], "students": {}, "teachers": {}, "train_sizes": [], "regimes": {}}
    base = {
        "name": "mine",
        "study": axes,
        "baseline": "opd",
        "questions": 1000,
        "k": 8,
        "cpu_seconds": 840,
        "selection": [],
        "trends": [],
        "settings": [],
    }
    (folder / "summary.json").write_text(json.dumps(base | summary), encoding="utf-8")
    return folder


def small(folder: Path, **summary) -> Path:
    rows = [
        run(method, seed, 0.6 + seed / 100 + shift) for method, shift in (("opd", 0.0), ("va_opd(tau=0.5)", 0.013)) for seed in range(3)
    ]
    base = {"kind": "baseline", "name": "student", "method": "student", "regime": None, "student": "s", "teacher": "T", "train_size": None}
    rows.append(base | {"accuracy": 0.444, "se": 0.012, "questions": 1000, "k": 8, **MEASURED, "kl": None, "seconds": None})
    tables = {"comparisons": [comparison("va_opd(tau=0.5)", 1.3)], "means": [means("opd", 0.61), means("va_opd(tau=0.5)", 0.623)]}
    return make(folder, rows, **tables | summary)


def test_a_study_shows_its_numbers(tmp_path: Path) -> None:
    text = text_of(page_of(write_report(small(tmp_path / "study"))))
    for expected in (
        "Differences from OPD",
        "VA-OPD (tau=0.5)",
        "+1.3 [−0.2, 2.8] 3 0.25 0.5",
        "with so few seeds it cannot be below 0.25",
        "2 of 3 75 41 150 60",
        "61.0 [59.0, 63.0] 12.0 5.0 0.080 −0.030 0.310 2.40 32.0 88 0.0003",
        "student – 44.4 ± 1.2",
        "1,000 questions, 8 answers each",
        "14 min 0 s",
        "6 runs, one row each",
    ):
        assert expected in text, expected
    assert "remark" not in text
    assert "Learning rates" not in text


def test_rates_students_and_trends_show_where_they_are(tmp_path: Path) -> None:
    tried = [{"lr": 1e-4, "accuracy": 0.5, "seeds": {"7": 0.5}}, {"lr": 1e-3, "accuracy": 0.55, "seeds": {"7": 0.55}}]
    students = [{"student": s, "mean": m, "low": m - 1, "high": m + 1, "n": 3} for s, m in (("a", 1.0), ("b", -2.0), ("c", 0.5))]
    over = {"mean": -0.2, "low": -4.0, "high": 3.6, "n": 3}
    trend = {**comparison("va_opd", 2.5), "axis": "teacher", "first": "S", "last": "L", "teacher": None}
    study = small(
        tmp_path / "study",
        comparisons=[comparison("va_opd", -0.2, per_student=students, over_students=over)],
        selection=[{"regime": None, "method": "opd", "chosen": 1e-3, "at_edge": True, "tried": tried}],
        trends=[trend],
        settings=[{**comparison("opd", 16.1), "axis": "regime", "first": "k4", "last": "k1", "regime": None}],
    )
    text = text_of(page_of(write_report(study)))
    for expected in (
        "−0.2 [−1.7, 1.3] [−4.0, 3.6] 3 0.25 0.5",
        "b −2.0 [−3.0, −1.0]",
        "VA-OPD, teacher L against S +2.5",
        "One method in two settings",
        "OPD, regime k1 against k4 +16.1",
        "OPD 0.001 ⚠ at the end of the range 0.0001: 50.0 (1) · 0.001: 55.0 (1)",
    ):
        assert expected in text, expected


def test_one_method_in_settings_says_how_small_p_can_be(tmp_path: Path) -> None:
    rows = [run("opd", seed, 0.6, regime=regime) for regime in ("k4", "k1") for seed in range(3)]
    setting = {**comparison("opd", 16.1), "axis": "regime", "first": "k4", "last": "k1", "regime": None}
    means_of = [means("opd", 0.5, regime=regime) for regime in ("k4", "k1")]
    text = text_of(page_of(write_report(make(tmp_path / "study", rows, comparisons=[], means=means_of, settings=[setting]))))
    for expected in ("There is one method only", "cannot be below 0.25. Holm’s p is corrected for the 1 comparison of its table."):
        assert expected in text, expected


def test_a_page_of_hundreds_of_runs_stays_small(tmp_path: Path) -> None:
    regimes = [f"r{i}" for i in range(36)]
    rows = [run(m, s, 0.5, regime=r, student=st) for r in regimes for m in ("opd", "va_opd") for s in range(4) for st in "abc"]
    tables = {"comparisons": [comparison("va_opd", 0.5, regime=r) for r in regimes]}
    tables["means"] = [means(m, 0.5, regime=r) for r in regimes for m in ("opd", "va_opd")]
    page = write_report(make(tmp_path / "study", rows, **tables))
    assert page.stat().st_size <= PAGE_BYTES
    text = text_of(page_of(page))
    assert "864 runs, one row each" in text
    assert page_of(page).count('<svg class="plot"') == 72


def test_torn_and_missing_files_are_mentioned(tmp_path: Path) -> None:
    study = small(tmp_path / "study")
    with (study / "results.jsonl").open("a") as file:
        file.write('{"kind": "cell", "na')
    assert "results.jsonl: 1 unreadable line(s) left out" in text_of(page_of(write_report(study)))
    (study / "results.jsonl").unlink()
    text = text_of(page_of(write_report(study)))
    assert "results.jsonl is not there" in text
    assert "+1.3" in text


@pytest.mark.parametrize("value", [None, [], {}, "x", 1e400, -1, True, [[1]], {"a": {"b": [None]}}])
def test_nothing_in_the_files_breaks_the_page(tmp_path: Path, value: object) -> None:
    row = dict.fromkeys(run("opd", 0, 0.5), value) | {"kind": "cell", "phase": "comparison"}
    entry, mean = dict.fromkeys(comparison("opd", 1.0), value), dict.fromkeys(means("opd", 0.5), value)
    broken = {
        "comparisons": [entry, value],
        "means": [mean, value],
        "trends": [entry | {"axis": value}],
        "settings": [entry | {"axis": value}, value],
        "selection": [{"tried": [{}]}, value],
    }
    rows = [run("opd", 0, 0.5), row, {"kind": "baseline", "method": value}]
    assert "Differences" in page_of(write_report(make(tmp_path / "study", rows, **broken, name=value, study=value, cpu_seconds=value)))


@pytest.mark.parametrize("text", [" ".join(HOSTILE), *(h for h in HOSTILE if "<" in h)])
def test_hostile_names_stay_text(tmp_path: Path, browser: Browser, text: str) -> None:
    rows = [run(text, 0, 0.5, regime=text, student=text, name=text), run("opd", 0, 0.5, regime="plain")]
    tables = {"comparisons": [comparison(text, 1.0, regime=text)], "means": [means(text, 0.5, regime=text, student=text)]}
    selection = [
        {"regime": text, "method": text, "chosen": 0.1, "at_edge": True, "tried": [{"lr": 0.1, "accuracy": 0.5, "seeds": {text: 1}}]}
    ]
    study = make(
        tmp_path / "study", rows, name=text, baseline=text, selection=selection, study={text: text, "recipe": {text: [text]}}, **tables
    )
    browser.open(write_report(study))
    assert browser.errors() == []
    assert browser.run("window.planted === undefined")
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('img, iframe, object').length") == 0


def test_the_page_fits_a_phone_and_draws_no_error(tmp_path: Path, browser: Browser) -> None:
    browser.open(write_report(small(tmp_path / "study")), width=390, height=800)
    assert browser.errors() == []
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_a_folder_of_one_seed_keeps_the_page_of_its_cells(study_folder: Path) -> None:
    assert not is_study(study_folder)
    assert not is_study(study_folder / "opd")


def test_curves_are_means_over_runs_with_the_spread_over_seeds() -> None:
    def curve(points: list) -> list:
        return [[step, accuracy, va, None, 0] for step, accuracy, va in points]

    rows = [
        {"seed": 1, "curve": curve([(0, 0.2, 0.1), (50, 0.4, 0.1)])},
        {"seed": 1, "curve": curve([(0, 0.4, 0.3), (50, 0.6, None)])},
        {"seed": 2, "curve": curve([(0, 0.5, 0.2), (25, 0.9, 0.1), (50, 0.7, 0.1)])},
    ]
    # At 0: seeds 30 and 50 -> mean 40, standard error 10; VA (0.1 + 0.3 + 0.2) / 3. Step 25 is one run's alone.
    first, last = mean_curve(rows)
    assert first == (0, pytest.approx(40), pytest.approx(10), pytest.approx(0.2))
    assert last == (50, pytest.approx(60), pytest.approx(10), None)
    assert mean_curve([{"seed": 1, "curve": None}]) == []


def test_small_parts() -> None:
    assert method_label("va_opd(tau=0.5)") == "VA-OPD (tau=0.5)"
    assert method_label("opd") == "OPD"
    assert method_colours(["va_opd", "opd", "sft"]) == {"va_opd": 1, "opd": 0, "sft": 2}
    assert [significance(p) for p in (None, 0.25, 0.00391, 1e-6)] == ["–", "0.25", "0.0039", "< 0.0001"]
    assert trail_plot([], slug="a", title="t", x_name="x") == ""
    line = Series("OPD", [0.07, 0.1], [20.0, 30.0], 0)
    picture = trail_plot([line], slug="a", title="t", x_name="mean VA")
    assert "OPD: from 0.07, 20 to 0.1, 30." in picture
    assert picture.count("<circle") == 2
