"""The tables of a study against hand computations, on invented rows."""

from __future__ import annotations

import json

import pytest

from vaopd.analysis.forecast import Costs, Forecast, estimated_seconds, remaining_seconds
from vaopd.analysis.matrix import Cell, Place
from vaopd.analysis.results import cell_row, choose_rates, chosen_rates, of_whole_seeds, tables
from vaopd.config import parse_config

MEASURED = dict.fromkeys(("blind_degraded", "blind_removed", "va", "student_va", "effective_rollouts", "kl", "tokens", "seconds"), 0.5)


def row(method, accuracy, *, student="s", seed=0, teacher="T", size=None, regime=None, curve=(), **changes):
    place = {"regime": regime, "student": student, "teacher": teacher, "train_size": size}
    own = {"method": method, "seed": seed, "lr": 1e-3, "accuracy": accuracy, "curve": [list(point) for point in curve]}
    return {"kind": "cell", "phase": "comparison", **place, **own, **MEASURED, **changes}


def test_differences_are_method_minus_baseline_paired_by_seed():
    # 62 - 60, 66 - 62, 63 - 61: 2, 4, 2 points: mean 8/3, s = 2/sqrt 3, se = 2/3, t(2) = 4.303
    opd = [row("opd", a, seed=s) for s, a in ((1, 0.60), (2, 0.62), (3, 0.61))]
    other = [row("va_opd", a, seed=s) for s, a in ((3, 0.63), (1, 0.62), (2, 0.66))]  # in another order
    found = tables([*opd, *other], "opd")
    (entry,) = found["comparisons"]
    assert (entry["method"], entry["baseline"]) == ("va_opd", "opd")
    assert entry["points"]["mean"] == pytest.approx(8 / 3)
    assert entry["points"]["low"] == pytest.approx(8 / 3 - 4.30265 * 2 / 3, abs=1e-4)
    assert entry["points"]["n"] == 3
    assert entry["p"] == entry["smallest_p"] == entry["holm"] == 0.25
    assert entry["per_student"] == []
    assert entry["over_students"] is None
    # The other way round every sign turns.
    (turned,) = tables([*opd, *other], "va_opd")["comparisons"]
    assert turned["points"]["mean"] == pytest.approx(-8 / 3)
    means = {entry["method"]: entry["accuracy"] for entry in found["means"]}
    assert means["opd"]["mean"] == pytest.approx(0.61)
    assert means["opd"]["high"] == pytest.approx(0.61 + 4.30265 * 0.01 / 3**0.5, abs=1e-6)


def test_several_students_are_averaged_for_each_seed_first():
    gains = {("a", 1): 1, ("a", 2): 3, ("b", 1): 5, ("b", 2): 7, ("c", 1): 0, ("c", 2): 2}  # points
    rows = [row("opd", 0.5, student=st, seed=se) for st, se in gains]
    rows += [row("va_opd", 0.5 + g / 100, student=st, seed=se) for (st, se), g in gains.items()]
    (entry,) = tables(rows, "opd")["comparisons"]
    # By seed: (1+5+0)/3 = 2, (3+7+2)/3 = 4: mean 3, se 1, t(1) = 12.706. Over pairs it would be t(5).
    assert entry["points"] == pytest.approx({"mean": 3, "low": 3 - 12.7062, "high": 3 + 12.7062, "n": 2}, abs=1e-3)
    assert entry["p"] == 0.5  # two units
    # By student: 2, 6, 1: mean 3, s = sqrt 7, se = sqrt(7/3), t(2) = 4.303
    assert entry["over_students"]["mean"] == pytest.approx(3)
    assert entry["over_students"]["high"] == pytest.approx(3 + 4.30265 * (7 / 3) ** 0.5, abs=1e-3)
    assert [(s["student"], s["mean"], s["n"]) for s in entry["per_student"]] == [
        ("a", pytest.approx(2), 2),
        ("b", pytest.approx(6), 2),
        ("c", pytest.approx(1), 2),
    ]
    means = [(entry["method"], entry["student"], entry["runs"]) for entry in tables(rows, "opd")["means"]]
    assert means[:4] == [("opd", None, 6), ("opd", "a", 2), ("opd", "b", 2), ("opd", "c", 2)]


def test_two_students_have_no_interval_over_students():
    rows = [row(m, 0.5, student=st, seed=se) for m in ("opd", "sft") for st in "ab" for se in (1, 2)]
    (entry,) = tables(rows, "opd")["comparisons"]
    assert entry["over_students"] is None


def test_holm_is_over_all_comparisons_of_the_study():
    rows = []
    for regime, gain in (("x", 0.01), ("y", 0.02)):
        for seed in range(6):
            rows += [row("opd", 0.5, seed=seed, regime=regime), row("va_opd", 0.5 + gain + seed / 1000, seed=seed, regime=regime)]
            rows.append(row("sft", 0.5 + (-1) ** seed / 100, seed=seed, regime=regime))
    entries = tables(rows, "opd")["comparisons"]
    assert [(e["regime"], e["method"]) for e in entries] == [("x", "va_opd"), ("x", "sft"), ("y", "va_opd"), ("y", "sft")]
    smallest = 2 / 64
    assert [e["p"] for e in entries] == [smallest, 1.0, smallest, 1.0]
    assert [e["holm"] for e in entries] == pytest.approx([4 * smallest, 1.0, 4 * smallest, 1.0])


def test_before_the_end_only_whole_seeds_are_compared():
    rows = [row(method, 0.5, seed=seed, student=student) for seed in (1, 2) for student in "ab" for method in ("opd", "sft")]
    assert {r["seed"] for r in of_whole_seeds(rows[:-1], 4)} == {1}
    assert of_whole_seeds(rows[:3], 4) == []
    assert of_whole_seeds(rows, 4) == rows


def test_a_missing_run_is_no_pair():
    with pytest.raises(ValueError, match="only one of the two methods"):
        tables([row("opd", 0.5, seed=1), row("opd", 0.5, seed=2), row("sft", 0.5, seed=1)], "opd")


def test_trends_are_differences_of_differences_along_an_axis():
    gains = {("S", 1): 1, ("S", 2): 2, ("M", 1): 9, ("M", 2): 9, ("L", 1): 4, ("L", 2): 7}
    rows = [row("opd", 0.5, teacher=t, seed=s) for t, s in gains]
    rows += [row("va_opd", 0.5 + g / 100, teacher=t, seed=s) for (t, s), g in gains.items()]
    (trend,) = tables(rows, "opd")["trends"]
    assert (trend["axis"], trend["first"], trend["last"]) == ("teacher", "S", "L")
    assert trend["points"]["mean"] == pytest.approx(4)  # (4 - 1 + 7 - 2) / 2
    assert tables([r for r in rows if r["teacher"] == "S"], "opd")["trends"] == []
    sizes = [{**r, "train_size": {"S": 10, "M": 20, "L": 30}[r["teacher"]], "teacher": "T"} for r in rows]
    (trend,) = tables(sizes, "opd")["trends"]
    assert (trend["axis"], trend["first"], trend["last"], trend["points"]["mean"]) == ("train_size", 10, 30, pytest.approx(4))


def test_one_method_in_two_settings_is_paired_by_seed_with_a_family_of_its_own():
    """k1 minus k4: 4, 2, 6 points for OPD; VA-OPD in neither direction. The first value given is what the others are compared with."""
    accuracies = {"k4": (0.50, 0.52, 0.54), "k1": (0.54, 0.54, 0.60)}
    rows = [row("opd", a, seed=s, regime=regime) for regime, values in accuracies.items() for s, a in enumerate(values)]
    rows += [row("va_opd", 0.5, seed=s, regime=regime) for regime in accuracies for s in range(3)]
    opd, va_opd = tables(rows, "opd")["settings"]
    assert (opd["method"], opd["axis"], opd["first"], opd["last"], opd["regime"]) == ("opd", "regime", "k4", "k1", None)
    assert opd["points"]["mean"] == pytest.approx(4)
    assert opd["points"]["low"] == pytest.approx(4 - 4.30265 * 2 / 3**0.5, abs=1e-4)
    assert (opd["p"], opd["holm"]) == (0.25, 0.5)
    assert (va_opd["method"], va_opd["points"]["mean"], va_opd["p"]) == ("va_opd", 0, 1)
    assert tables([r for r in rows if r["regime"] == "k4"], "opd")["settings"] == []
    teachers = [row("opd", 0.5 + gain, seed=s, teacher=t) for t, gain in (("S", 0), ("M", 0.01), ("L", 0.03)) for s in (1, 2)]
    assert [(e["axis"], e["first"], e["last"], round(e["points"]["mean"], 6)) for e in tables(teachers, "opd")["settings"]] == [
        ("teacher", "S", "M", 1),
        ("teacher", "S", "L", 3),
    ]


def test_when_a_method_reached_the_baselines_last_accuracy():
    opd = [row("opd", 0.5, seed=s, curve=[(0, 0.3, None, None, 0), (50, 0.6, None, None, 5), (100, 0.55, None, None, 11)]) for s in (1, 2)]
    fast = row("va_opd", 0.5, seed=1, curve=[(0, 0.3, None, None, 0), (50, 0.55, None, None, 8), (100, 0.6, None, None, 16)])
    never = row("va_opd", 0.5, seed=2, curve=[(0, 0.3, None, None, 0), (50, 0.4, None, None, 8), (100, 0.54, None, None, 16)])
    (entry,) = tables([*opd, fast, never], "opd")["comparisons"]
    assert entry["until_baseline"] == {"of": 2, "reached": 1, "step": 50, "seconds": 8, "baseline_step": 50, "baseline_seconds": 5}


def test_the_rate_is_the_best_on_the_development_seeds_and_the_smaller_of_equals():
    def dev(method, lr, seed, accuracy, regime=None):
        return {"regime": regime, "method": method, "lr": lr, "seed": seed, "accuracy": accuracy}

    rows = [
        dev("opd", 1e-3, 7, 0.6),
        dev("opd", 1e-3, 8, 0.2),
        dev("opd", 1e-4, 7, 0.5),
        dev("opd", 1e-4, 8, 0.5),
        dev("opd", 1e-5, 7, 0.1),
    ]
    rows += [
        dev("opd", 1e-5, 8, 0.1),
        dev("sft", 1e-3, 7, 0.5),
        dev("sft", 1e-3, 8, 0.25),
        dev("sft", 1e-4, 7, 0.25),
        dev("sft", 1e-4, 8, 0.5),
    ]
    opd, sft = choose_rates(rows)
    assert (opd["chosen"], opd["at_edge"]) == (1e-4, False)  # 0.5 against 0.4 of the rate with the best single run
    assert [entry["lr"] for entry in opd["tried"]] == [1e-5, 1e-4, 1e-3]
    assert opd["tried"][2] == {"lr": 1e-3, "accuracy": pytest.approx(0.4), "seeds": {"7": 0.6, "8": 0.2}}
    assert (sft["chosen"], sft["at_edge"]) == (1e-4, True)
    assert chosen_rates([opd, sft]) == {(None, "opd"): 1e-4, (None, "sft"): 1e-4}
    assert choose_rates([]) == []


def config_of(run, **changes):
    values = {"run": str(run), "method": "opd", "student": "s", "teacher": "t", "data": {"train": "t.jsonl", "eval": "e.jsonl"}, **changes}
    return parse_config(values)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_resumed_runs_costs_count_each_step_once(tmp_path):
    train = [{"kind": "train", "step": s, "effective_rollouts": e} for s, e in ((1, 2.0), (2, None), (3, 4.0))]
    evals = [{"kind": "eval", "step": s, "accuracy": a, "va": 0.1, "kl": k} for s, a, k in ((0, 0.2, 0.9), (2, 0.5, 0.4), (3, 0.4, 0.3))]
    write_rows(tmp_path / "metrics.jsonl", [evals[0], *train[:2], evals[1], train[2], evals[2]])
    costs = [
        ("eval", 0, 5.0),
        ("train", 1, 1.0),
        ("train", 2, 1.5),
        ("eval", 2, 4.0),
        ("train", 2, 2.0),
        ("eval", 2, 4.5),
        ("train", 3, 3.0),
    ]
    write_rows(
        tmp_path / "cost.jsonl", [{"kind": k, "step": s, "cpu_seconds": c, "seconds": 2 * c} for k, s, c in (*costs, ("eval", 3, 4.0))]
    )
    entry = {"accuracy": 0.41, "se": 0.02, "blind_degraded": 0.1, "va": 0.07, "tokens": 30.0}
    (tmp_path / "eval.json").write_text(json.dumps({"questions": 9, "k": 4, "models": {"trained": entry}}))
    (tmp_path / "cell.json").write_text(json.dumps({"student_va": 0.25}))
    found = cell_row(Cell("opd", "comparison", Place(None, None, None, None), config_of(tmp_path)), levels=[0.45, 0.9])
    assert found["curve"] == [[0, 0.2, 0.1, 0.9, 0], [2, 0.5, 0.1, 0.4, 3.0], [3, 0.4, 0.1, 0.3, 6.0]]
    assert found["seconds"] == 6.0
    assert found["seconds_total"] == pytest.approx(6.0 + 5.0 + 4.5 + 4.0)
    assert found["reached"] == [{"level": 0.45, "step": 2, "seconds": 3.0}, {"level": 0.9, "step": None, "seconds": None}]
    assert (found["effective_rollouts"], found["kl"], found["student_va"], found["steps"]) == (3.0, 0.3, 0.25, 3)
    assert (found["teacher"], found["student"], found["regime"], found["blind_removed"]) == ("t", "s", None, None)


def test_seconds_of_a_cell_by_hand(tmp_path):
    # 10 steps of 4 prompts x 3; evaluations at 0, 4, 8, 10 of 5 questions x 2, final 3 conditions of 7 x 2; scored 4·5·2 + 7·2 + 7
    config = config_of(
        tmp_path,
        rollouts={"k": 3},
        optim={"steps": 10, "prompts_per_step": 4},
        eval={"every": 4, "k": 2, "questions": 5},
    )
    costs = Costs(rollout=0.1, response=0.01, scored=0.001, start=6.0)
    assert estimated_seconds(config, (100, 20, 7), costs) == pytest.approx(6 + 120 * 0.1 + (4 * 10 + 42) * 0.01 + (40 + 14 + 7) * 0.001)
    sft = config_of(tmp_path, method="sft", optim={"epochs": 1, "prompts_per_step": 4}, eval={"every": 100, "k": 2})
    assert estimated_seconds(sft, (10, 5, 0), Costs(1.0, 0, 0, 0)) == 3 * 4  # ceil(10 / 4) steps of one response a prompt
    entries = [Forecast("comparison", None, "opd", 8, 2, 30.0, "x"), Forecast("comparison", None, "sft", 4, 4, 99.0, "x")]
    assert remaining_seconds(entries, 2) == 90.0
