import random

import numpy as np
import pytest

from vaopd.evaluate.grade import is_correct
from vaopd.views import pixelate
from vaopd.world import draw


@pytest.mark.parametrize(
    ("kind", "labels", "working", "answer"),
    [
        ("perimeter", (3, 5, 4), "3+5=8, 8+4=12", "12"),
        ("longest", (3, 9, 4), "9", "9"),
        ("difference", (3, 9, 4), "9-3=6", "6"),
        ("difference", (5, 5, 5), "5-5=0", "0"),
    ],
)
def test_solve_by_hand(kind, labels, working, answer):
    assert draw.solve(kind, labels) == (working, answer)


def test_solutions_are_graded_right_and_name_the_labels():
    rng = random.Random(0)
    for _ in range(200):
        figure = draw.sample_figure(rng)
        assert is_correct(figure.solution, figure.answer)
        assert f"{figure.labels[0]}, {figure.labels[1]} and {figure.labels[2]}" in figure.solution
        assert not is_correct(figure.solution, str(int(figure.answer) + 1))


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    first, same, other = (draw.sample_figure(random.Random(seed)) for seed in (1, 1, 2))
    assert first.image.tobytes() == same.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


def test_labels_stand_left_to_right_and_pixelation_takes_them_away():
    """Two pictures that differ in one label differ most in that third of the picture, and hardly once pixelated."""
    one, two = (draw.draw_triangle(random.Random(4), labels) for labels in ((1, 5, 5), (8, 5, 5)))
    difference = np.abs(np.asarray(one, float) - np.asarray(two, float)).sum(axis=(0, 2))
    assert difference[:32].sum() > 0
    assert difference[32:].sum() == 0
    seen = np.abs(np.asarray(one, float) - np.asarray(two, float)).max()
    blurred = np.abs(np.asarray(pixelate(one), float) - np.asarray(pixelate(two), float)).max()
    assert blurred < seen / 2


def test_board_is_the_background():
    image = draw.draw_triangle(random.Random(0), (1, 2, 3))
    assert image.size == (draw.SIDE, draw.SIDE)
    assert image.getpixel((0, 0)) == draw.BOARD
