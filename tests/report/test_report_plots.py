"""Plots as SVG strings: ranges, gaps, bands, names; each is well-formed XML."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from vaopd.report.plots import (
    POINTS,
    Dot,
    Frame,
    Series,
    bucket,
    dot_plot,
    line_plot,
    mass_plot,
    nice_ticks,
    pieces,
    short,
    smooth,
    y_range,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (5, 5, [5]),
        (0, 1e-6, [0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (1.5e-6, "1.5e−6"), (12000.0, "12,000"), (-3.0, "−3"), (0.0, "0")])
def test_axis_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_a_lone_spike_does_not_flatten_the_rest_and_is_mentioned() -> None:
    values = [1.0 + 0.01 * i for i in range(99)] + [500.0]
    (low, high), above = y_range(values, zero=True)
    assert low == 0
    assert 2 < high < 5
    assert above == 1
    svg = line_plot([Series("loss", [float(i) for i in range(100)], values)], slug="s", title="Loss", unit="nats")
    assert "1 point above, up to 500" in svg


def test_a_constant_line_has_a_range() -> None:
    for value in (0.0, 1e-6, 38.0, -2.0):
        (low, high), above = y_range([value] * 30, zero=False)
        assert low < value < high
        assert above == 0


def test_long_lines_are_averaged_in_equal_pieces_without_losing_the_mean() -> None:
    series = Series("s", [float(i) for i in range(24_000)], [float(i % 7) for i in range(24_000)])
    short_one = bucket(series)
    assert len(short_one.x) == len(short_one.y) == POINTS
    assert sum(short_one.known) / POINTS == pytest.approx(sum(series.known) / 24_000)


def test_null_values_are_gaps_not_zeros() -> None:
    series = Series("s", [0.0, 1.0, 2.0, 3.0], [1.0, None, 3.0, 4.0])
    runs = pieces(series, Frame((0, 3), (0, 4)), series.y)
    assert [len(r) for r in runs] == [1, 2]
    assert smooth([1.0, None, 3.0], 1) == [1.0, None, 3.0]
    assert line_plot([Series("s", [0.0], [None])], slug="s", title="t", unit="u") == ""


def test_the_band_is_one_standard_error_each_side() -> None:
    svg = line_plot([Series("acc", [0.0, 10.0], [40.0, 60.0], se=[5.0, 5.0])], slug="s", title="t", unit="%", dots=True)
    path = next(e for e in ElementTree.fromstring(svg).iter() if "band" in e.get("class", ""))
    x_y = [tuple(map(float, p.split())) for p in path.get("d", "").strip("MZ").split("L")]
    dots = [float(e.get("cy", "0")) for e in ElementTree.fromstring(svg).iter() if "dot" in e.get("class", "")]
    assert len(x_y) == 4
    assert (x_y[0][1] + x_y[3][1]) / 2 == pytest.approx(dots[0], abs=0.1)
    assert x_y[0][1] < dots[0] < x_y[3][1]


def test_mass_plot_marks_what_the_top_ten_percent_hold() -> None:
    svg = mass_plot([0, 5, 15, 100], [0, 80, 96, 100])
    assert "top 10 % of tokens: 88.0 % of the mass" in svg
    ElementTree.fromstring(svg)
    assert mass_plot([], []) == ""


def test_every_plot_is_named_and_hostile_labels_are_escaped() -> None:
    bad = '"><script>alert(1)</script>'
    plots = [
        line_plot([Series(bad, [1.0, 2.0], [1.0, 2.0])], slug="a", title=bad, unit=bad),
        dot_plot([Dot(bad, 1.0, 0.0, 2.0, bad)], slug="b", title=bad, unit=bad, low=-1, high=3),
    ]
    for svg in plots:
        root = ElementTree.fromstring(svg)
        tags = [e.tag for e in root.iter()]
        assert root.get("role") == "img"
        assert {"title", "desc"} <= set(tags)
        assert "script" not in tags


def test_dots_stay_inside_whatever_the_values() -> None:
    svg = dot_plot([Dot("x", 400.0, -900.0, 1e9, "t")], slug="b", title="t", unit="u", low=0, high=100)
    places = [float(e.get("cx", "0%")[:-1]) for e in ElementTree.fromstring(svg).iter("circle")]
    assert all(0 <= p <= 100 for p in places)
