"""Scores and standard errors of the benchmarks from logged samples, with numbers worked out by hand."""

import math

import pytest

from vaopd.errors import ConfigError, DataError
from vaopd.evaluate.lmms_benchmarks import BENCHMARKS, BY_RULE, Part, average, chosen, reported, score, standard_error


def plain(*scores, clusters=None):
    return Part(1.0, {str(i): (float(s), str(clusters[i] if clusters else i)) for i, s in enumerate(scores)})


def test_one_part_of_single_questions_has_the_usual_standard_error():
    parts = [plain(1, 0, 0, 0)]
    assert score(parts) == 25
    assert standard_error(parts) == pytest.approx(100 * 0.5 / math.sqrt(4))  # std with ddof 1 of (1, 0, 0, 0) is 0.5


def test_questions_that_are_drawn_together_count_once():
    """Every question twice: as clusters they say no more than once."""
    twice = [plain(1, 1, 0, 0, 0, 0, 0, 0, clusters="aabbccdd")]
    assert score(twice) == 25
    assert standard_error(twice) == pytest.approx(standard_error([plain(1, 0, 0, 0)]))
    assert standard_error([plain(1, 1, 0, 0, 0, 0, 0, 0)]) < standard_error(twice)


def test_parts_that_are_the_same_question_do_not_average_their_errors_away():
    """A score that is the mean of two equal parts has the error of one."""
    one = [plain(1, 0, 1, 0, 0)]
    halves = [Part(0.5, one[0].units), Part(0.5, one[0].units)]
    assert score(halves) == pytest.approx(score(one))
    assert standard_error(halves) == pytest.approx(standard_error(one))
    opposed = [Part(0.5, one[0].units), Part(0.5, {unit: (1 - s, c) for unit, (s, c) in one[0].units.items()})]
    assert standard_error(opposed) == pytest.approx(0, abs=1e-12)


def test_one_cluster_has_no_standard_error():
    assert math.isnan(standard_error([plain(1, 0, clusters="aa")]))


def test_avg_at_k_is_the_mean_over_samples_and_needs_the_same_questions():
    first, second = [plain(1, 0, 1)], [plain(0, 0, 1)]
    both = average([first, second])
    assert [s for s, _ in both[0].units.values()] == [0.5, 0, 1]
    assert score(both) == pytest.approx((score(first) + score(second)) / 2)
    with pytest.raises(DataError, match="different questions"):
        average([first, [plain(0, 0)]])


def wemath(problem, key, right):
    return {"doc_id": f"{problem}{key}", "wemath_loose": {"ID": problem, "key": key, "acc_score": float(right)}}


@pytest.mark.parametrize(
    ("steps", "whole", "strict", "loose"),
    [
        ((1, 1), 1, 1, 1),
        ((1, 1), 0, 0.5, 0.5),  # inadequate generalisation
        ((1, 0), 1, 0, 1),  # rote memorisation, when all steps are asked for
        ((0, 0), 1, 0, 0),
        ((1, 0), 0, 0, 0),  # insufficient knowledge
        ((0, 0), 0, 0, 0),
        ((0, 1, 0), 1, 0, 1),
        ((1, 1, 1), 0, 0.5, 0.5),
    ],
)
def test_wemath(steps, whole, strict, loose):
    n = len(steps)
    samples = [wemath("p", f"{n}steps_{i}", right) for i, right in enumerate(steps, 1)] + [wemath("p", f"{n}steps_multi", whole)]
    samples.append(wemath("other", "one-step", 1))  # counts nowhere
    parts = BENCHMARKS["wemath"].parts(samples)
    assert [part.mean for part in parts] == [strict, loose]
    assert score(parts) == 50 * (strict + loose)


def hallusion(category, figure, question, correct, set_=0):
    row = {"category": category, "subcategory": "map", "set_id": set_, "figure_id": figure, "question_id": question}
    return {"doc_id": f"{category}{set_}{figure}{question}", "aAcc": row | {"correct": correct}}


def test_hallusionbench_counts_questions_figures_and_questions_over_their_figures():
    samples = [
        hallusion("VD", "0", 0, 1),
        hallusion("VD", "0", 1, 1),
        hallusion("VD", "1", 0, 0),
        hallusion("VD", "1", 1, 1),
        hallusion("VS", "0", 0, 0),  # no figure is shown: no figure counts it
    ]
    a_acc, f_acc, q_acc = BENCHMARKS["hallusionbench"].parts(samples)
    assert (a_acc.mean, f_acc.mean, q_acc.mean) == pytest.approx((3 / 5, 1 / 2, 1 / 3))
    assert score([a_acc, f_acc, q_acc]) == pytest.approx(100 * (3 / 5 + 1 / 2 + 1 / 3) / 3)
    assert {cluster for part in (a_acc, f_acc, q_acc) for _, cluster in part.units.values()} == {"VD_map_0", "VS_map_0"}


def test_hallusionbench_by_rule_looks_for_yes():
    rows = [("Yes, it is", "1"), ("No.", "0"), ("no", "1"), ("YES", "0")]
    base = {"category": "VD", "subcategory": "map", "set_id": 0, "question_id": 0}
    samples = [
        {"doc_id": i, "aAcc": {**base, "figure_id": i, "model_prediction": text, "gt_answer": gold}} for i, (text, gold) in enumerate(rows)
    ]
    assert [part.mean for part in BY_RULE["hallusionbench"].parts(samples)] == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("kind", "gold", "parsed", "right"),
    [
        ("multiple-choice", "B", ["B"], True),
        ("multiple-choice", "B", ["A"], False),
        ("open", "12.50", [[12.5, "cm"]], True),
        ("open", "1,200", [[1200.0]], True),
        ("open", "12", [["twelve"]], False),
        ("open", "Paris", [["the answer is paris"]], True),
        ("open", "A", [["banana"]], False),
        ("open", "A", [[" a", "a "]], True),
    ],
)
def test_mmmu(kind, gold, parsed, right):
    sample = {"doc_id": 0, "mmmu_acc": {"question_type": kind, "answer": gold, "parsed_pred": parsed}}
    assert score(BENCHMARKS["mmmu"].parts([sample])) == 100 * right


def test_mmstar_is_the_mean_of_its_sub_categories():
    def sample(i, category, right):
        return {"doc_id": i, "average": {"l2_category": category, "score": float(right)}}

    samples = [sample(0, "geometry", 1), sample(1, "geometry", 0), sample(2, "geometry", 0), sample(3, "recognition", 1)]
    assert score(BENCHMARKS["mmstar"].parts(samples)) == pytest.approx(100 * (1 / 3 + 1) / 2)


def test_mathverse_draws_the_versions_of_a_problem_together():
    samples = [{"doc_id": i, "gpt_eval_score": i % 2, "submission": {"problem_index": p}} for i, p in enumerate("1122")]
    (part,) = BENCHMARKS["mathverse"].parts(samples)
    assert part.mean == 0.5
    assert {cluster for _, cluster in part.units.values()} == {"1", "2"}


@pytest.mark.parametrize(
    ("name", "results", "percent"),
    [
        ("wemath", {"wemath_strict,none": "40.00%", "wemath_loose,none": "50.50%", "wemath_loose_stderr,none": "N/A"}, 45.25),
        ("mathvista", {"llm_as_judge_eval,none": 63.9}, 63.9),
        ("mathvista", {"llm_as_judge_eval,none": None}, 0),  # as lmms-eval says that nothing was right
        ("mathverse", {"gpt_eval_score,none": 0.319}, 31.9),
        ("hallusionbench", {"aAcc,none": 60.0, "fAcc,none": 40.0, "qAcc,none": 50.0}, 50),
        ("ai2d", {"alias": "ai2d", "exact_match,flexible-extract": 0.778}, 77.8),
        ("ocrbench", {"ocrbench_accuracy,none": 0.859}, 85.9),
    ],
)
def test_lmms_evals_own_number(name, results, percent):
    assert reported(BENCHMARKS[name], results) == pytest.approx(percent)


def test_a_metric_that_is_not_there_names_those_that_are():
    with pytest.raises(DataError, match=r"no metric 'exact_match'; they have: accuracy"):
        reported(BENCHMARKS["ai2d"], {"alias": "ai2d", "accuracy,none": 0.5})


def test_without_a_judge_its_benchmarks_are_refused_or_graded_by_rule():
    with pytest.raises(ConfigError, match=r"^mathvista, mathverse: graded by a judge, and none was given\. Give --judge-url"):
        chosen(list(BENCHMARKS), judge=False)
    assert chosen(["hallusionbench"], judge=False)[0].task == "hallusion_bench_image_rule"
    assert [b.name for b in chosen(list(BENCHMARKS), judge=True)] == list(BENCHMARKS)
    assert chosen(["hallusionbench"], judge=True)[0].judged


def test_misspelt_and_own_tasks():
    with pytest.raises(ConfigError, match=r"no benchmark 'mathvers'\. Did you mean 'mathverse'\?"):
        chosen(["mathvers"], judge=False)
    with pytest.raises(ConfigError, match="TASK=METRIC"):
        chosen(["my_task="], judge=False)
    (own,) = chosen(["my_task=acc", "my_task=acc"], judge=False)
    assert score(own.parts([{"doc_id": 0, "acc": 1}, {"doc_id": 1, "acc": {"score": 0.5}}])) == 75
    with pytest.raises(DataError, match="no metric 'acc'; they have: doc_id, exact_match"):
        own.parts([{"doc_id": 0, "exact_match": 1}])
