import random
import re

import pytest

from vaopd.config import WorldConfig, load_world
from vaopd.errors import ConfigError
from vaopd.evaluate.grade import is_correct
from vaopd.world.questions import check, figures, sample_figure, sample_reading, work


@pytest.mark.parametrize(
    ("kind", "labels", "unit", "working", "answer"),
    [
        ("perimeter", (3, 5, 4), 1, "3+5=8, 8+4=12", 12),
        ("perimeter", (3, 5, 4, 9), 1, "3+5=8, 8+4=12, 12+9=21", 21),
        ("perimeter", (3, 5, 4), 7, "3+5=8, 8+4=12, 12*7=84", 84),
        ("longest", (3, 9, 4), 1, "9", 9),
        ("shortest", (3, 9, 4), 2, "3, 3*2=6", 6),
        ("difference", (3, 9, 4), 1, "9-3=6", 6),
        ("difference", (5, 5, 5), 3, "5-5=0, 0*3=0", 0),
    ],
)
def test_work_by_hand(kind, labels, unit, working, answer):
    assert work(kind, labels, unit) == (working, answer)


@pytest.mark.parametrize(
    ("kind", "text"), [("perimeter", "4+9=13, 13+3=16"), ("difference", "3+6=9"), ("longest", "9>=3"), ("shortest", "3<=9")]
)
def test_checks_by_hand(kind, text):
    assert check(kind, (3, 9, 4)) == text


def test_a_slip_is_carried_on():
    assert work("perimeter", (3, 5, 4), 2, compute=lambda value: value + 1) == ("3+5=9, 9+4=14, 14*2=29", 29)


KNOBS = [
    {},
    {"labels": 5},
    {"unit": 9},
    {"working": 0},
    {"working": 2},
    {"wording": "terse"},
    {"wording": "wordy"},
    {"wording": "terse", "working": 0},
    {"questions": ("shortest",)},
    {"phrasing": 0.0},
    {"style": 1},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_solutions_are_right_name_the_labels_and_do_all_their_sums_correctly(knobs):
    rng, world = random.Random(0), WorldConfig(**knobs)
    for _ in range(60):
        figure = sample_figure(rng, world)
        assert is_correct(figure.solution, figure.answer)
        assert not is_correct(figure.solution, str(int(figure.answer) + 1))
        assert f"{', '.join(map(str, figure.labels[:-1]))} and {figure.labels[-1]}" in figure.solution
        assert len(figure.labels) == world.labels
        assert figure.kind in world.questions
        operations = re.findall(r"(\d+)([+*-])(\d+)=(\d+)", figure.solution)
        for a, sign, b, c in operations:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(c)
        if world.working == 0:
            assert not operations


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_slips_are_as_frequent_as_asked_and_leave_the_answer_right(share):
    rng, world = random.Random(0), WorldConfig(questions=("difference",))
    wrong = sum(not is_correct(f.solution, f.answer) for f in (sample_figure(rng, world, slips=share) for _ in range(2000)))
    # abs(0 - 1) and abs(1 - 2) fall back on a right value in few cases
    assert wrong / 2000 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("knobs", [{"working": 2}, {"wording": "wordy"}, {"wording": "terse"}, {"phrasing": 0.0}, {"style": 1}], ids=str)
def test_a_knob_of_the_text_leaves_pictures_and_questions_alone(knobs):
    plain, turned = (sample_figure(random.Random(5), WorldConfig(**k)) for k in ({}, knobs))
    assert (plain.labels, plain.kind, plain.problem, plain.answer) == (turned.labels, turned.kind, turned.problem, turned.answer)
    assert plain.image.tobytes() == turned.image.tobytes()
    assert plain.solution != turned.solution


@pytest.mark.parametrize("knobs", [{"grain": 20.0}, {"label_size": 18}], ids=str)
def test_a_knob_of_the_picture_leaves_the_labels_alone(knobs):
    plain, turned = (sample_figure(random.Random(5), WorldConfig(**k)) for k in ({}, knobs))
    assert plain.labels == turned.labels
    assert plain.image.tobytes() != turned.image.tobytes()


@pytest.mark.parametrize("knobs", [{"grain": 20.0}, {"wording": "wordy"}, {"working": 2}, {"phrasing": 0.0}], ids=str)
def test_a_whole_set_keeps_its_labels_and_questions_when_a_knob_is_turned(knobs):
    plain, turned = (list(figures(WorldConfig(seed=3, **k), "train", 20)) for k in ({}, knobs))
    assert [(f.labels, f.kind, f.problem) for f in plain] == [(f.labels, f.kind, f.problem) for f in turned]
    assert len({f.labels for f in plain}) > 15


def test_the_share_of_label_tokens_is_about_3_10_and_30_percent():
    """Label digits per word, number or mark of a solution and its end: what the tiny models' tokenizer counts."""
    for share, knobs in ((0.03, {"wording": "wordy"}), (0.10, {}), (0.30, {"wording": "terse", "working": 0})):
        rng, world = random.Random(1), WorldConfig(**knobs)
        tokens = [len(re.findall(r"[^\W\d]+|\d|[^\w\s]", sample_figure(rng, world).solution)) + 1 for _ in range(200)]
        assert 3 * 200 / sum(tokens) == pytest.approx(share, rel=0.15)


def test_reading_is_the_same_pictures_with_the_labels_as_text():
    figure = sample_reading(random.Random(2))
    assert figure.solution == figure.answer == "{}, {} and {}".format(*figure.labels)


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    first, same, other = (sample_figure(random.Random(seed)) for seed in (1, 1, 2))
    assert first.image.tobytes() == same.image.tobytes()
    assert first.solution == same.solution
    assert first.image.tobytes() != other.image.tobytes()


def test_a_knob_that_does_not_exist_or_is_out_of_range_is_named():
    assert load_world(["labels=4", "wording=wordy"]).labels == 4
    with pytest.raises(ConfigError, match="label_size"):
        load_world(["labelsize=12"])
    with pytest.raises(ConfigError, match="labels"):
        load_world(["labels=7"])
