"""The statistics of a study: pure functions on numbers, without a model and without scipy (docs/own_study.md says what each assumes)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

EXACT_UP_TO = 16  # pairs: 2^16 sign patterns are counted, more are sampled
DRAWS = 100_000
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, in the unit of the values."""

    mean: float
    low: float | None  # None: one value, no interval
    high: float | None
    n: int  # values that the interval is over


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).

    Raises:
        ValueError: freedom < 1.
    """
    if freedom < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, found {freedom}")
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    # odd: cos + 2/3 cos^3 + (2·4)/(3·5) cos^5 + …; even: 1 + 1/2 cos^2 + (1·3)/(2·4) cos^4 + …; both up to cos^(freedom - 2)
    term, series = (cosine if odd else 1.0), 0.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        series += term
        term *= cosine**2 * (power + 1) / (power + 2)
    between = 2 / math.pi * (angle + math.sin(angle) * series) if odd else math.sin(angle) * series
    return 0.5 + between / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability, by bisection to about 1e-12 of its size.

    Raises:
        ValueError: a probability outside (0, 1), or freedom < 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"a quantile's probability lies between 0 and 1, found {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean: s / sqrt(n) with the sample standard deviation; None for one value."""
    n = len(values)
    centre = sum(values) / n
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean with its t-interval: the values are independent draws, normal enough for their mean.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("there are no values to average")
    n, centre, se = len(values), sum(values) / len(values), standard_error(values)
    if se is None:
        return Estimate(centre, None, None, n)
    half = t_quantile((1 + confidence) / 2, n - 1) * se
    return Estimate(centre, centre - half, centre + half, n)


def paired_differences(treated: Mapping[Key, float], control: Mapping[Key, float]) -> dict[Key, float]:
    """treated - control for the keys (a seed; a student and a seed) of both.

    Raises:
        ValueError: one side has a key that the other lacks; silently leaving it out would compare other runs than were made.
    """
    if alone := treated.keys() ^ control.keys():
        raise ValueError(f"only one of the two methods was run for {', '.join(map(str, sorted(alone, key=str)))}")
    return {key: value - control[key] for key, value in treated.items()}


def sign_flip_p(differences: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p of the sign-flip test that the paired differences are symmetric about 0 (Fisher's randomisation test).

    The share of all 2^n ways to give the differences signs whose |mean| is at least the observed one, the observed way included: so
    never below 2 / 2^n (`smallest_p`). Beyond `EXACT_UP_TO` differences the ways are sampled, and p is (1 + hits) / (1 + draws).

    Raises:
        ValueError: no differences.
    """
    if not differences:
        raise ValueError("there are no differences to test")
    sizes = np.abs(np.asarray(differences, dtype=np.float64))
    # The sums of other orders differ in the last bits: ties with the observed sum must count.
    observed = abs(float(np.sum(differences))) - 1e-9 * max(1e-300, float(sizes.sum()))
    n = len(sizes)
    if n <= EXACT_UP_TO:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ sizes) >= observed))
    generator, hits = np.random.default_rng(seed), 0
    for start in range(0, draws, 10_000):
        signs = 2 * generator.integers(0, 2, (min(10_000, draws - start), n)) - 1
        hits += int(np.sum(np.abs(signs @ sizes) >= observed))
    return (1 + hits) / (1 + draws)


def smallest_p(n: int) -> float:
    """The smallest p that a two-sided sign-flip test of n differences can give: with 5 seeds nothing is below 0.0625."""
    return 2 / 2**n if n <= EXACT_UP_TO else 1 / (1 + DRAWS)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979), in the order given: each p against the family of all of them.

    The i-th smallest of m is multiplied by m - i + 1, never falls below a smaller one's, and is at most 1. It holds the chance of any
    false rejection under any dependence of the tests.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def seed_means(values: Mapping[tuple[str, int], float]) -> list[float]:
    """One value for each seed: the mean over its students, in the order of the seeds. Keys are (student, seed).

    Runs of one seed share the order of the prompts and the sampling noise, so they are one unit, whatever the students are.
    """
    return _means(values, 1)


def student_means(values: Mapping[tuple[str, int], float]) -> list[float]:
    """One value for each student: the mean over its seeds. Keys are (student, seed)."""
    return _means(values, 0)


def _means(values: Mapping[tuple[str, int], float], place: int) -> list[float]:
    found: dict[str | int, list[float]] = {}
    for key, value in values.items():
        found.setdefault(key[place], []).append(value)
    return [sum(found[unit]) / len(found[unit]) for unit in sorted(found, key=lambda unit: (str(type(unit)), unit))]
