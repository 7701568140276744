"""The built-in world: questions about figures whose labels must be read, with worked solutions.

A worked solution is mostly language (how it is phrased does not depend on the picture) around a few tokens that do: the labels
and what follows from them. That is the situation in which the visual advantage should matter (arXiv 2605.21924).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from vaopd.config import WorldConfig
from vaopd.world import phrases
from vaopd.world.draw import draw_polygon

DIGITS = range(1, 10)
DEFAULT = WorldConfig()


@dataclass(frozen=True)
class Figure:
    """One question about one picture."""

    image: Image.Image  # SIDE x SIDE, RGB
    labels: tuple[int, ...]  # the side lengths, left to right
    kind: str  # of the question
    problem: str
    solution: str
    answer: str


def sample_figure(rng: random.Random, world: WorldConfig = DEFAULT, *, slips: float = 0.0) -> Figure:
    """A figure, a question and a worked solution, all drawn from `rng`.

    Args:
        slips: share of the operations of a solution that go wrong by one or two, and are carried on: what a pupil with poor arithmetic
            is taught. `answer` stays right.
    """
    labels, kind = _labels(rng, world), rng.choice(world.questions)
    unit = rng.randint(2, world.unit) if world.unit > 1 else 1
    problem = rng.choice(phrases.QUESTIONS[kind])
    if unit > 1:
        problem = f"{problem} {phrases.UNIT.format(unit)}"

    def compute(value: int) -> int:
        return value if rng.random() >= slips else abs(value + rng.choice((-2, -1, 1, 2)))

    image = draw_polygon(rng, labels, label_size=world.label_size, grain=world.grain)
    return Figure(image, labels, kind, problem, _solution(rng, kind, labels, unit, world, compute), str(work(kind, labels, unit)[1]))


def figures(world: WorldConfig, name: str, count: int) -> Iterator[Figure]:
    """The first `count` figures of a set. Each has random numbers of its own, so a knob leaves alone what it does not turn."""
    for index in range(count):
        yield sample_figure(random.Random(f"{world.seed}|{name}|{index}"), world)


def sample_reading(rng: random.Random, world: WorldConfig = DEFAULT) -> Figure:
    """The same pictures with the plain task of reading the labels: what a tiny vision tower has to learn first."""
    labels = _labels(rng, world)
    image = draw_polygon(rng, labels, label_size=world.label_size, grain=world.grain)
    return Figure(image, labels, "reading", phrases.READ_QUESTION, spoken(labels), spoken(labels))


def exact(value: int) -> int:
    """Arithmetic without slips."""
    return value


def work(kind: str, labels: Sequence[int], unit: int = 1, compute: Callable[[int], int] = exact) -> tuple[str, int]:
    """The working, one operation at a time (`3+5=8, 8+4=12`, then `12*2=24` for sides in units of 2), and the answer it leads to.

    `compute` sees the right result of every operation and gives the one that is written and carried on.
    """
    if kind == "perimeter":
        steps, found = _running_sum(labels, compute)
    elif kind == "difference":
        found = compute(max(labels) - min(labels))
        steps = [f"{max(labels)}-{min(labels)}={found}"]
    else:
        found = compute(max(labels) if kind == "longest" else min(labels))
        steps = [str(found)]
    if unit > 1:
        whole = compute(found * unit)
        steps.append(f"{found}*{unit}={whole}")
        found = whole
    return ", ".join(steps), found


def check(kind: str, labels: Sequence[int], compute: Callable[[int], int] = exact) -> str:
    """The same result found another way, in the figure's units."""
    if kind == "perimeter":
        return ", ".join(_running_sum(labels[::-1], compute)[0])
    if kind == "difference":
        return f"{min(labels)}+{max(labels) - min(labels)}={compute(max(labels))}"
    return f"{max(labels)}>={min(labels)}" if kind == "longest" else f"{min(labels)}<={max(labels)}"


def spoken(labels: Sequence[int]) -> str:
    """`3, 5 and 4`."""
    return f"{', '.join(map(str, labels[:-1]))} and {labels[-1]}"


def _labels(rng: random.Random, world: WorldConfig) -> tuple[int, ...]:
    return tuple(rng.choice(DIGITS) for _ in range(world.labels))


def _running_sum(labels: Sequence[int], compute: Callable[[int], int]) -> tuple[list[str], int]:
    steps, total = [], labels[0]
    for label in labels[1:]:
        more = compute(total + label)
        steps.append(f"{total}+{label}={more}")
        total = more
    return steps, total


def _solution(rng: random.Random, kind: str, labels: Sequence[int], unit: int, world: WorldConfig, compute: Callable[[int], int]) -> str:
    def say(alternatives: Sequence[str]) -> str:
        return phrases.choose(rng, alternatives, world.phrasing, world.style)

    terse = world.wording == "terse"
    remarks = [f"{say(openings)}, {rest}" for openings, rest in phrases.REMARKS] if world.wording == "wordy" else []
    read = spoken(labels) if terse else f"{say(phrases.OPENING)}, {say(phrases.READING)} {spoken(labels)}"
    sentences = [*remarks[:2], f"{read}.", *remarks[2:4]]
    steps, answer = work(kind, labels, unit, compute)
    if world.working >= 1:
        sentences.append(f"{steps}." if terse else f"{say(phrases.REASONING[kind])} {steps}.")
    if world.working >= 2:
        again = check(kind, labels, compute)
        sentences.append(f"{again}." if terse else f"{say(phrases.CHECKING)} {again}.")
    return " ".join([*sentences, *remarks[4:], f"{answer}." if terse else f"{say(phrases.CLOSING)} {answer}."])
