"""The built-in world: figures on a dark board whose labels must be read to answer a question about them.

A worked solution is mostly language (how it is phrased does not depend on the picture) around a few tokens that do: the labels
and what follows from them. That is the situation in which the visual advantage should matter (arXiv 2605.21924).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels; a tiny vision tower of patch 8 and merge 2 sees 16 image tokens
BOARD = (24, 32, 38)  # the background; the models' image mean, so that it maps to zero
CHALK = ((236, 226, 160), (160, 214, 236), (236, 176, 160), (176, 228, 172))
LABEL = (255, 255, 255)
LABEL_SIZE = 14  # points of Pillow's own font: a label is about 8 x 10 pixels
LABEL_DISTANCE = 8  # pixels between a side's middle and its label's
DIGITS = range(1, 10)

QUESTIONS = {
    "perimeter": ("What is the perimeter of this triangle?", "Find the perimeter of the figure.", "How long is the whole outline?"),
    "longest": ("How long is the longest side?", "Find the length of the longest side.", "Which length does the longest side have?"),
    "difference": (
        "How much longer is the longest side than the shortest?",
        "Find the difference between the longest and the shortest side.",
        "By how much do the longest and the shortest side differ?",
    ),
}
READ_QUESTION = "Read the labels from left to right."

OPENING = ("Looking at the figure", "From the drawing", "In the picture", "On the board")
READING = ("the sides measure", "the labels say", "the three sides are", "I read the lengths")
REASONING = {
    "perimeter": ("Adding them up gives", "Their sum is", "Together they make", "So the outline is"),
    "longest": ("The largest of them is", "The longest one is", "Comparing them the greatest is", "The biggest value is"),
    "difference": (
        "Longest minus shortest is",
        "Subtracting the shortest gives",
        "The gap between the extremes is",
        "Taking the difference gives",
    ),
}
CLOSING = ("The answer is", "Hence the answer is", "So the answer is", "Therefore the answer is")


@dataclass(frozen=True)
class Figure:
    """One question about one picture."""

    image: Image.Image  # SIDE x SIDE, RGB
    labels: tuple[int, ...]  # the three side lengths, left to right
    problem: str
    solution: str
    answer: str


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=LABEL_SIZE)


def draw_triangle(rng: random.Random, labels: tuple[int, ...]) -> Image.Image:
    """A triangle with its side lengths written outside the sides' middles, left to right in the order of `labels`."""
    image = Image.new("RGB", (SIDE, SIDE), BOARD)
    pen = ImageDraw.Draw(image)
    centre_x, centre_y = SIDE / 2 + rng.uniform(-3, 3), SIDE / 2 + rng.uniform(-3, 3)
    radius, turn = rng.uniform(17, 22), -math.pi / 2 + rng.uniform(-0.15, 0.15)
    angles = [turn + corner * 2 * math.pi / 3 + rng.uniform(-0.1, 0.1) for corner in range(3)]
    corners = [(centre_x + radius * math.cos(angle), centre_y + radius * math.sin(angle)) for angle in angles]
    pen.polygon(corners, outline=rng.choice(CHALK))
    for label, place in zip(labels, _label_places(corners, centre_x, centre_y), strict=True):
        pen.text(place, str(label), fill=LABEL, font=_font(), anchor="mm")
    return image


def _label_places(corners: list[tuple[float, float]], centre_x: float, centre_y: float) -> list[tuple[float, float]]:
    places = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
        away_x, away_y = middle_x - centre_x, middle_y - centre_y
        norm = math.hypot(away_x, away_y)
        places.append((middle_x + away_x / norm * LABEL_DISTANCE, middle_y + away_y / norm * LABEL_DISTANCE))
    return sorted(places)


def solve(kind: str, labels: tuple[int, ...]) -> tuple[str, str]:
    """The working (`3+5=8, 8+4=12`) and the answer (`12`) of a question of this kind."""
    if kind == "perimeter":
        first, second, third = labels
        return f"{first}+{second}={first + second}, {first + second}+{third}={sum(labels)}", str(sum(labels))
    if kind == "longest":
        return str(max(labels)), str(max(labels))
    return f"{max(labels)}-{min(labels)}={max(labels) - min(labels)}", str(max(labels) - min(labels))


def sample_figure(rng: random.Random) -> Figure:
    """A figure, a question and a worked solution, all drawn from `rng`."""
    labels = (rng.choice(DIGITS), rng.choice(DIGITS), rng.choice(DIGITS))
    kind = rng.choice(tuple(QUESTIONS))
    working, answer = solve(kind, labels)
    solution = (
        f"{rng.choice(OPENING)}, {rng.choice(READING)} {labels[0]}, {labels[1]} and {labels[2]}. "
        f"{rng.choice(REASONING[kind])} {working}. {rng.choice(CLOSING)} {answer}."
    )
    return Figure(draw_triangle(rng, labels), labels, rng.choice(QUESTIONS[kind]), solution, answer)


def sample_reading(rng: random.Random) -> Figure:
    """The same pictures with the plain task of reading the labels: what a tiny vision tower has to learn first."""
    labels = (rng.choice(DIGITS), rng.choice(DIGITS), rng.choice(DIGITS))
    text = f"{labels[0]}, {labels[1]} and {labels[2]}"
    return Figure(draw_triangle(rng, labels), labels, READ_QUESTION, text, text)


def texts() -> Iterator[str]:
    """Every phrase of the world, for the tokenizer."""
    for phrases in (*QUESTIONS.values(), *REASONING.values(), OPENING, READING, CLOSING, (READ_QUESTION,)):
        yield from phrases
