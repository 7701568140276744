import math
import random
from collections import Counter

import pytest

from vaopd.world import phrases


@pytest.mark.parametrize("nats", [0.3, 0.5, 1.0, 1.5, 1.75])
def test_preferences_have_the_entropy_that_was_asked_for(nats):
    p = phrases.preferences(nats, 6)
    assert sum(p) == pytest.approx(1)
    assert -sum(x * math.log(x) for x in p) == pytest.approx(nats, abs=1e-6)
    assert list(p) == sorted(p, reverse=True)


def test_no_entropy_is_one_phrase_and_too_much_is_all_alike():
    assert phrases.preferences(0, 6) == (1, 0, 0, 0, 0, 0)
    assert phrases.preferences(5, 6) == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize("style", [0, 1])
def test_choices_come_as_often_as_preferred_and_another_style_prefers_others(style):
    rng, options = random.Random(1), list("abcdef")
    counts = Counter(phrases.choose(rng, options, 1.0, style) for _ in range(20_000))
    rotated = options[3 * style :] + options[: 3 * style]
    for option, p in zip(rotated, phrases.preferences(1.0, 6), strict=True):
        assert counts[option] / 20_000 == pytest.approx(p, abs=0.015)


def test_every_choice_has_six_alternatives_that_differ():
    groups = [*phrases.REASONING.values(), phrases.OPENING, phrases.READING, phrases.CHECKING, phrases.CLOSING]
    groups += [openings for openings, _ in phrases.REMARKS]
    assert {len(set(group)) for group in groups} == {phrases.ALTERNATIVES}
    assert set(phrases.REASONING) == set(phrases.QUESTIONS)
