"""A whole study, in this process: what is run, in which order, what is written, what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from vaopd import cli, terminal
from vaopd.analysis import study as study_module
from vaopd.analysis.matrix import comparison_cells
from vaopd.analysis.study import foresee, plan, run_study
from vaopd.config import WorldConfig, load_study
from vaopd.data.sources import read_examples
from vaopd.errors import CheckpointError, ConfigError, DataError, StudyFailed
from vaopd.report import write_report
from vaopd.train.folder import RunFolder
from vaopd.world.data import write_world

RECIPE = {
    "student": "builtin:student",
    "teacher": "builtin:teacher",
    "rollouts": {"k": 2, "max_tokens": 40, "temperature": 1.0, "top_p": 1.0},
    "optim": {"prompts_per_step": 4, "steps": 2},
    "eval": {"every": 2, "k": 2},
}
VALUES = {"name": "tiny", "methods": ["opd", "sft"], "world": {"train": 12, "eval": 4, "test": 6}, "recipe": RECIPE}


def study_file(folder: Path, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**VALUES, "run": str(folder / "study"), **changes}, sort_keys=False))
    return path


class Done:
    """A process that has ended well."""

    returncode = 0

    def poll(self) -> int:
        return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two methods, seeds and rates in a regime of its own, run in this process; and the names of its processes, in order."""
    folder = tmp_path_factory.mktemp("study")
    started = []

    def start(job):
        started.append(job.name)
        if (so_far := study.run / "summary.json").exists():
            (folder / f"before-{job.log.stem}.json").write_bytes(so_far.read_bytes())
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text("checks     ok\n")
        job.result.parent.mkdir(parents=True, exist_ok=True)
        cli.app(list(job.command), standalone_mode=False)
        return Done()

    changes = {
        "regimes": {"grainy": {"world": {"grain": 30}, "recipe": {"rollouts": {"max_tokens": 36}}}},
        "seeds": [0, 1],
        "learning_rates": [1e-5, 1e-3],
        "development_seeds": [9],
        "levels": [0.01],
        "keep": "numbers",
    }
    recipe = {**RECIPE, "teacher": "builtin:teacher"}
    study = load_study(study_file(folder, recipe=recipe, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "_start", start)
        patch.setattr(study_module.time, "sleep", lambda seconds: None)
        summary = run_study(study, on_progress=lambda states: None, workers=2)
    return study, summary, started


def rows_of(study) -> list[dict]:
    return [json.loads(line) for line in (study.run / "results.jsonl").read_text().splitlines()]


def test_development_comes_first_and_chooses_the_rate_of_the_comparison(finished):
    study, summary, started = finished
    assert [name.startswith("development/") for name in started] == [True] * 4 + [False] * 6
    rows = rows_of(study)
    assert Counter(row.get("phase", row["method"]) for row in rows) == {"development": 4, "comparison": 4, "student": 1, "teacher": 1}
    chosen = {(row["regime"], row["method"]): row["chosen"] for row in summary["selection"]}
    assert len(chosen) == 2
    for row in rows:
        if row.get("phase") == "comparison":
            assert row["lr"] == chosen[row["regime"], row["method"]]
            assert row["seed"] in (0, 1)
            assert row["questions"] == 6
        elif row["kind"] == "cell":
            assert row["seed"] == 9
            assert row["questions"] == 4  # data.eval: no development run has seen a test question


def test_a_row_has_what_was_measured(finished):
    study, _, _ = finished
    row = next(row for row in rows_of(study) if row["name"] == "opd-grainy-seed1")
    evaluation = json.loads((study.run / "opd-grainy-seed1" / "eval.json").read_text())
    assert row["accuracy"] == evaluation["models"]["trained"]["accuracy"]
    assert row["blind_degraded"] == evaluation["models"]["trained"]["blind_degraded"]
    assert evaluation["models"]["student"]["accuracy"] == next(r["accuracy"] for r in rows_of(study) if r["method"] == "student")
    assert row["steps"] == 2
    assert [point[0] for point in row["curve"]] == [0, 2]
    assert row["curve"][0][4] == 0 < row["curve"][1][4] == row["seconds"] < row["seconds_total"]
    assert row["effective_rollouts"] == pytest.approx(2, abs=1e-5)  # OPD weighs both siblings alike
    assert [entry["level"] for entry in row["reached"]] == [0.01]


def test_the_own_image_gap_is_measured_on_one_set_of_responses(finished):
    study, _, _ = finished
    rows = {row["name"]: row for row in rows_of(study)}
    student, teacher = rows["student-grainy"]["student_va"], rows["teacher-grainy"]["student_va"]
    assert student is not None
    assert teacher is not None
    assert student != teacher
    files = sorted(path.name for path in (study.run / "baselines").glob("responses*"))
    assert files == ["responses-development-grainy.json", "responses-grainy.json"]
    given = json.loads((study.run / "baselines" / "responses-grainy.json").read_text())["responses"]
    assert set(given) <= {example.id for example in read_examples(study.run / "data-grainy" / "test.jsonl")}


def test_the_study_is_written_with_everything_filled_in(finished):
    study, _, _ = finished
    assert load_study(study.run / "study.yaml") == study


def test_a_finished_cell_of_numbers_keeps_no_model(finished):
    study, _, _ = finished
    left = {path.name for path in (study.run / "sft-grainy-seed0").iterdir()}
    assert left == {"config.yaml", "data.json", "metrics.jsonl", "eval.json", "cell.json", "cost.jsonl"}


def test_the_tables_of_the_summary(finished):
    study, summary, _ = finished
    rows = {row["name"]: row for row in rows_of(study)}
    assert summary["baseline"] == "opd"
    assert summary["versions"]["torch"] == torch.__version__
    (entry,) = summary["comparisons"]
    by_hand = [100 * (rows[f"sft-grainy-seed{seed}"]["accuracy"] - rows[f"opd-grainy-seed{seed}"]["accuracy"]) for seed in (0, 1)]
    assert [pair[2] for pair in entry["pairs"]] == pytest.approx(by_hand)
    assert entry["points"]["mean"] == pytest.approx(sum(by_hand) / 2)
    assert entry["smallest_p"] == 0.5
    assert {name.partition("-")[0] for name in summary["gains"]} == {"opd", "sft"}
    assert summary["cpu_seconds"] == round(sum(row["seconds_total"] for row in rows.values() if row["kind"] == "cell"))
    assert not any("per_question" in entry for entry in summary["models"].values())


def test_until_all_is_done_the_summary_has_the_seeds_that_are_finished_everywhere(finished, tmp_path):
    study, summary, started = finished
    assert [name for name in started if name.startswith("sft-")] == ["sft-grainy-seed0", "sft-grainy-seed1"]
    assert not (study.run.parent / "before-sft-grainy-seed0.json").exists()
    text = (study.run.parent / "before-sft-grainy-seed1.json").read_text()
    so_far = json.loads(text)
    assert so_far["unfinished"] == {"seeds": 1, "of": 2}
    (entry,), (whole,) = so_far["comparisons"], summary["comparisons"]
    assert entry["pairs"] == whole["pairs"][:1]
    assert "unfinished" not in summary
    (tmp_path / "summary.json").write_text(text)
    (tmp_path / "results.jsonl").write_text((study.run / "results.jsonl").read_text())
    assert "The study is not finished: differences and means are of the 1 of 2 seeds" in write_report(tmp_path).read_text()


def test_a_finished_study_starts_no_process_and_the_page_and_tables_show_it(finished, monkeypatch, capsys):
    study, summary, _ = finished
    monkeypatch.setattr(study_module, "_start", lambda job: pytest.fail("a finished study started a process"))
    again = run_study(study, on_progress=lambda now: None)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    assert {entry.done == entry.cells for entry in foresee(study)} == {True}
    page = write_report(study.run).read_text()
    assert "Differences from OPD" in page
    monkeypatch.setattr(terminal.console, "width", 120)
    terminal.show_study(summary)
    out = capsys.readouterr().out
    assert "rate of sft grainy: " in out
    assert "minus opd" in out
    assert "below 0.5" in out


@pytest.mark.parametrize("own_data", [False, True])
def test_the_plan_says_where_its_seconds_are_from(tmp_path, capsys, own_data):
    data = write_world(WorldConfig(train=12, eval=4, test=6), tmp_path / "own").model_dump(mode="json")
    changes = {"world": None, "recipe": {**RECIPE, "data": data}} if own_data else {}
    study = load_study(study_file(tmp_path, seeds=[0, 1, 2], **changes))
    entries = foresee(study)
    assert [(e.method, e.cells, e.done, e.source) for e in entries] == [("opd", 3, 0, "calibrated"), ("sft", 3, 0, "calibrated")]
    assert entries[0].seconds > entries[1].seconds > 0  # sft trains on one response a prompt
    terminal.show_plan(study, entries, 2)
    out = capsys.readouterr().out
    assert "2 methods x 3 seeds" in out
    assert "6 cells, 0 done" in out
    assert not (study.run / "opd-seed0").exists()


def test_a_failing_cell_ends_the_study_with_the_end_of_its_output(tmp_path):
    study = load_study(study_file(tmp_path))
    study_module.write_data(study)
    (study.run / "data" / "train.jsonl").write_text('{"problm": "x"}\n')
    with pytest.raises(StudyFailed, match="Did you mean 'problem'"):
        run_study(study, on_progress=lambda now: None, workers=1)


def test_a_study_that_is_stopped_stops_its_processes(tmp_path):
    """Else the same command, given again, would start a cell that still runs."""
    path = study_file(tmp_path, recipe={**RECIPE, "optim": {"prompts_per_step": 4, "steps": 5000}, "eval": {"every": 5000, "k": 1}})
    command = [sys.executable, "-m", "vaopd", "study", str(path), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        metrics, until = tmp_path / "study" / "opd" / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < until:
            time.sleep(0.1)
        with pytest.raises(CheckpointError, match="another process is writing"), RunFolder(metrics.parent).claimed():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        with RunFolder(metrics.parent).claimed():  # nobody has it any more
            pass
    finally:
        process.kill()


def test_results_of_another_recipe_are_not_mixed_in(tmp_path):
    study = load_study(study_file(tmp_path))
    cells = comparison_cells(study, {})
    folder = cells[0].config.run
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cells[0].config.to_yaml())
    plan(study, cells)
    other = load_study(study_file(tmp_path), ["recipe.optim.lr=2e-4"])
    with pytest.raises(ConfigError, match=r"optim.lr was 1e-06, is 0.0002"):
        plan(other, comparison_cells(other, {}))


def test_a_matrix_without_answers_is_refused_before_anything_runs(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"problem": f"{name}?"}) + "\n")
    recipe = {**RECIPE, "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}}
    study = load_study(study_file(tmp_path, world=None, recipe=recipe, seeds=[0, 1]))
    with pytest.raises(DataError, match=r"1 rows of .*test.jsonl have no answer, the first is 'row-1'"):
        run_study(study, on_progress=lambda now: None)


def test_one_bar_over_many_cells_counts_the_running_ones_by_their_steps(tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"kind": "train", "step": 5, "loss": 1.0, "seconds": 1.0}) + "\n")
    job = study_module.Job("a", (), tmp_path / "log", tmp_path / "none", metrics, steps=10)
    assert terminal._share_done(job) == pytest.approx(0.45)
    jobs = {study_module.Job(f"opd-seed{i}", (), tmp_path / "log", tmp_path / "none"): "waiting" for i in range(9)}
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.StudyView(load_study(study_file(tmp_path, seeds=[0, 1]))) as view:
        view.update({**jobs, job: "waiting"})
        now[0] = 109.0
        view.update({**jobs, job: "running"})
        (task,) = view.bars.tasks
    assert (task.description, task.completed, task.total) == ("cells", 0, 10)
    assert task.fields["text"] == "a"
    # 0.45 cells in 9 s: 20 s each, and 9.55 are left.
    assert task.fields["rate"] == "3 min left"
