"""How the built-in world talks: every sentence is chosen from alternatives that mean the same and do not depend on the picture."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import cache

ALTERNATIVES = 6  # of every choice in a solution
QUESTIONS = {
    "perimeter": ("What is the perimeter of this figure?", "Find the perimeter of the figure.", "How long is the whole outline?"),
    "longest": ("How long is the longest side?", "Find the length of the longest side.", "Which length does the longest side have?"),
    "shortest": ("How long is the shortest side?", "Find the length of the shortest side.", "Which length does the shortest side have?"),
    "difference": (
        "How much longer is the longest side than the shortest?",
        "Find the difference between the longest and the shortest side.",
        "By how much do the longest and the shortest side differ?",
    ),
}
READ_QUESTION = "Read the labels from left to right."
UNIT = "Each unit is {} cm."

OPENING = ("Looking at the figure", "From the drawing", "In the picture", "On the board", "As the figure shows", "Going by the picture")
READING = ("the sides measure", "the labels say", "the sides are", "I read the lengths", "we find the lengths", "the numbers are")
REASONING = {
    "perimeter": (
        *("Adding them up gives", "Their sum is", "Together they make"),
        *("So the outline is", "The whole length is", "Summing the sides gives"),
    ),
    "longest": (
        *("The largest of them is", "The longest one is", "Comparing them the greatest is"),
        *("The biggest value is", "So the longest side is", "The greatest number is"),
    ),
    "shortest": (
        *("The smallest of them is", "The shortest one is", "Comparing them the least is"),
        *("The lowest value is", "So the shortest side is", "The smallest number is"),
    ),
    "difference": (
        *("Longest minus shortest is", "Subtracting the shortest gives", "The gap between the extremes is"),
        *("Taking the difference gives", "So the sides differ by", "The longest one exceeds the shortest by"),
    ),
}
CHECKING = ("Checking this gives", "As a check", "To be sure", "Once more", "The other way round", "Checking again gives")
CLOSING = (
    *("The answer is", "Hence the answer is", "So the answer is"),
    *("Therefore the answer is", "Thus the answer is", "And so the answer is"),
)
# Sentences of a wordy solution: a choice, and a rest that is always the same.
REMARKS = (
    (
        ("First of all", "To begin with", "As a first step", "At the start", "Before anything else", "In the beginning"),
        "every label on the board belongs to one side of the figure.",
    ),
    (
        ("Of course", "Clearly", "In general", "As always", "By the way", "Naturally"),
        "the length of a side is the number that is written next to it.",
    ),
    (
        ("After that", "Then", "In the second step", "Following this", "From there", "Next"),
        "we only have to work with these numbers and with nothing else.",
    ),
    (
        ("In this way", "With this", "By doing so", "Step by step", "Going on like this", "Without any trouble"),
        "the question that was asked about the figure can be answered.",
    ),
    (
        ("At last", "In the end", "Finally", "To finish", "As a last step", "All in all"),
        "it remains to write down what we have found for the whole figure.",
    ),
)


def choose(rng: random.Random, phrases: Sequence[str], nats: float, style: int) -> str:
    """One of the phrases, with this entropy. Another style likes the phrases in an order rotated by half their number."""
    shift = style * len(phrases) // 2
    return rng.choices([*phrases[shift:], *phrases[:shift]], preferences(nats, len(phrases)))[0]


@cache
def preferences(nats: float, count: int) -> tuple[float, ...]:
    """Probabilities p_i ∝ exp(-b·i) whose entropy is `nats`; the largest that `count` alternatives allow, where that is less."""
    if nats <= 0:
        return (1.0, *[0.0] * (count - 1))
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(_falling(middle, count)) > nats else (low, middle)
    return _falling(low, count)


def _falling(slope: float, count: int) -> tuple[float, ...]:
    weights = [math.exp(-slope * index) for index in range(count)]
    return tuple(weight / sum(weights) for weight in weights)


def _entropy(probabilities: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def texts() -> Iterator[str]:
    """Every phrase of the world, whatever its knobs, for the tokenizer."""
    for phrases in (*QUESTIONS.values(), *REASONING.values(), OPENING, READING, CHECKING, CLOSING, (READ_QUESTION, UNIT)):
        yield from phrases
    for openings, rest in REMARKS:
        yield from (*openings, rest)
