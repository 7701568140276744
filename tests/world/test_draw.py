import random

import numpy as np
import pytest

from vaopd.views import pixelate
from vaopd.world import draw


def test_labels_stand_left_to_right_and_pixelation_takes_them_away():
    """Two pictures that differ in one label differ only in that third of the picture, and hardly once pixelated."""
    one, two = (draw.draw_polygon(random.Random(4), labels) for labels in ((1, 5, 5), (8, 5, 5)))
    difference = np.abs(np.asarray(one, float) - np.asarray(two, float)).sum(axis=(0, 2))
    assert difference[:32].sum() > 0
    assert difference[32:].sum() == 0
    seen = np.abs(np.asarray(one, float) - np.asarray(two, float)).max()
    blurred = np.abs(np.asarray(pixelate(one), float) - np.asarray(pixelate(two), float)).max()
    assert blurred < seen / 2


@pytest.mark.parametrize("labels", [(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5)])
def test_every_label_is_on_the_board_and_left_of_the_next(labels):
    """Where the picture changes when a label changes: inside the board, and further right for the next label."""
    places = []
    for index in range(len(labels)):
        changed = [8 if i == index else label for i, label in enumerate(labels)]
        one, two = (np.asarray(draw.draw_polygon(random.Random(2), numbers), float) for numbers in (labels, changed))
        columns = np.flatnonzero(np.abs(one - two).sum(axis=(0, 2)))
        places.append(columns.mean())
        assert columns.min() > 0
        assert columns.max() < draw.SIDE - 1
    assert places == sorted(places)


def test_board_is_the_background():
    image = draw.draw_polygon(random.Random(0), (1, 2, 3))
    assert image.size == (draw.SIDE, draw.SIDE)
    assert image.getpixel((0, 0)) == draw.BOARD


def test_grain_is_noise_of_that_strength_and_the_same_for_the_same_seed():
    plain, grainy, again = (np.asarray(draw.draw_polygon(random.Random(3), (1, 2, 3), grain=grain), float) for grain in (0, 6, 6))
    assert (grainy - plain).std() == pytest.approx(6, rel=0.05)
    assert (grainy == again).all()


def test_label_size_changes_labels_and_nothing_else():
    small, large = (np.asarray(draw.draw_polygon(random.Random(3), (8, 8, 8), label_size=size), float) for size in (10, 18))
    white = [(np.asarray(picture) > 200).all(axis=2).sum() for picture in (small, large)]
    assert white[1] > 1.5 * white[0]
    assert (small[28:36, 28:36] == large[28:36, 28:36]).all()
