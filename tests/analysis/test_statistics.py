"""Statistics against hand computations and printed tables (Student's t: NIST/SEMATECH handbook, 1.3.6.7.2)."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from vaopd.analysis.statistics import (
    EXACT_UP_TO,
    holm,
    mean_interval,
    paired_differences,
    seed_means,
    sign_flip_p,
    smallest_p,
    standard_error,
    student_means,
    t_cdf,
    t_quantile,
)


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (10, 2.228), (30, 2.042), (100, 1.984), (1000, 1.962)],
)
def test_t_quantiles_are_those_of_the_printed_table(freedom, table):
    assert round(t_quantile(0.975, freedom), 3) == table
    assert t_quantile(0.025, freedom) == -t_quantile(0.975, freedom)


def test_t_with_one_and_two_degrees_of_freedom_has_a_closed_form():
    # 1: Cauchy, F = 1/2 + atan(t)/pi. 2: F = 1/2 + t / (2 sqrt(2 + t^2)).
    for t in (-3.0, -0.4, 0.0, 0.7, 5.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-14)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-14)
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)


def test_t_is_the_integral_of_its_density():
    def density(x: float, v: int) -> float:
        return math.gamma((v + 1) / 2) / (math.sqrt(v * math.pi) * math.gamma(v / 2)) * (1 + x * x / v) ** (-(v + 1) / 2)

    n, upper = 2000, 1.7
    for freedom in (3, 4, 9, 16):
        h = upper / n  # Simpson
        weights = [1, *[4 if i % 2 else 2 for i in range(1, n)], 1]
        area = h / 3 * sum(w * density(i * h, freedom) for i, w in enumerate(weights))
        assert t_cdf(upper, freedom) == pytest.approx(0.5 + area, abs=1e-9)


def test_what_t_refuses():
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_quantile(1.0, 3)
    with pytest.raises(ValueError, match="degree of freedom"):
        t_cdf(1.0, 0)


def test_mean_interval_by_hand():
    # 1, 2, 1: mean 4/3, sample variance 1/3, se sqrt(1/3/3) = 1/3, t(2) = 4.303
    found = mean_interval([1.0, 2.0, 1.0])
    assert found.mean == pytest.approx(4 / 3)
    assert found.low == pytest.approx(4 / 3 - 4.30265 / 3, abs=1e-5)
    assert found.high == pytest.approx(4 / 3 + 4.30265 / 3, abs=1e-5)
    assert found.n == 3
    assert standard_error([1.0, 2.0, 1.0]) == pytest.approx(1 / 3)


def test_one_value_has_no_interval_and_none_no_mean():
    found = mean_interval([0.4])
    assert (found.mean, found.low, found.high, found.n) == (0.4, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(5)
    hits = sum(e.low <= 2.0 <= e.high for e in (mean_interval([rng.gauss(2, 3) for _ in range(4)]) for _ in range(2000)))
    assert 0.935 < hits / 2000 < 0.965  # 95 % ± 3 standard errors; with the normal's 1.96 it would be 85 %


def test_differences_are_paired_by_key_not_by_place():
    assert paired_differences({("s", 1): 5.0, ("s", 2): 7.0}, {("s", 2): 6.0, ("s", 1): 1.0}) == {("s", 1): 4.0, ("s", 2): 1.0}
    with pytest.raises(ValueError, match=r"only one .* \('s', 3\)"):
        paired_differences({("s", 1): 5.0, ("s", 3): 1.0}, {("s", 1): 1.0})


def test_sign_flip_by_hand():
    # 3, 2, -1: the eight sums are ±6, ±4, ±2, ±0 (3+2+1, 3+2-1, 3-2+1, 3-2-1). Observed 4: |6|, |6|, |4|, |4| of 8.
    assert sign_flip_p([3.0, 2.0, -1.0]) == 4 / 8
    # All of one sign: only the observed way and its mirror are as extreme.
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4]) == 2 / 16 == smallest_p(4)
    assert sign_flip_p([-0.1, -0.2, -0.3, -0.4]) == 2 / 16
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert smallest_p(5) == 0.0625


def test_sign_flip_counts_ties_that_rounding_would_lose():
    # In tenths 2, 4, -4: the sums are ±10, ±6, ±2, ±2, so every way is at least as extreme as the observed 2. In floating point the
    # sums of some orders fall short of it by a last bit.
    assert sign_flip_p([0.2, 0.4, -0.4]) == 1.0
    assert sign_flip_p([0.3, -0.4, -0.3]) == 6 / 8  # ±10, ±4, ±4, ±2 against 4
    rng = random.Random(0)
    for n in (3, 4, 5):
        for _ in range(100):
            tenths = [rng.randint(-12, 12) for _ in range(n)]
            ways = [abs(sum(s * x for s, x in zip(signs, tenths, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
            assert sign_flip_p([x / 10 for x in tenths]) == sum(way >= abs(sum(tenths)) for way in ways) / 2**n


def test_sign_flip_equals_plain_enumeration():
    rng = random.Random(1)
    for n in (1, 2, 5, 9):
        d = [rng.gauss(0.5, 1) for _ in range(n)]
        ways = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
        assert sign_flip_p(d) == pytest.approx(sum(way >= abs(sum(d)) - 1e-12 for way in ways) / 2**n, abs=1e-15)


def test_sampled_sign_flip_is_near_the_exact_and_repeats():
    rng = random.Random(3)
    d = [rng.gauss(0.35, 1) for _ in range(EXACT_UP_TO + 1)]
    exact = sum(
        abs(sum(s * x for s, x in zip(signs, d, strict=True))) >= abs(sum(d)) - 1e-12 for signs in itertools.product((1, -1), repeat=17)
    )
    assert sign_flip_p(d) == pytest.approx(exact / 2**17, abs=0.005)
    assert sign_flip_p(d) == sign_flip_p(d)
    assert sign_flip_p([1.0] * 40) == 1 / 100_001  # never 0


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 x 4 3 2 1 = .04 .06 .06 .04; a later one is never below an earlier: .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []
    # Bonferroni would say 0.02 for both; the second is tested in a family of one.
    assert holm([0.01, 0.011]) == pytest.approx([0.02, 0.02])
    assert holm([0.001, 0.03]) == pytest.approx([0.002, 0.03])


def test_units_of_several_students():
    values = {("a", 2): 1.0, ("b", 2): 3.0, ("a", 10): 5.0, ("b", 10): 9.0}
    assert seed_means(values) == [2.0, 7.0]  # seed 2 before 10
    assert student_means(values) == [3.0, 6.0]
