"""Small pure functions from numbers to inline SVG. Colours come from the page's CSS classes (`c0…`), so light and dark are one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

Values = Sequence[float | None]

WIDTH, HEIGHT = 380, 204
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30
POINTS = 240  # per line; a longer one is averaged in equal pieces
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line: `y` against training steps `x`, None for a gap, `se` for the band y ± se."""

    label: str
    x: Sequence[float]
    y: Values
    colour: int = 0
    se: Values = field(default=())

    @property
    def known(self) -> list[float]:
        """The values that are there."""
        return [v for v in self.y if v is not None]


@dataclass(frozen=True)
class Frame:
    """Data ranges of a plot and their places in it."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        """Horizontal place of a value."""
        low, high = self.x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        """Vertical place of a value; one outside the range sits on the border."""
        low, high = self.y
        share = min(max((value - low) / ((high - low) or 1), 0.0), 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside [low, high], at most about `most`."""
    span = high - low
    if span <= 1e-12 * max(abs(low), abs(high), 1e-200):
        return [low]
    raw = span / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: `0.25`, `1.5e−6`, `12,000`."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("e-0", "e-").replace("-", "−")


def y_range(values: Sequence[float], *, zero: bool) -> tuple[tuple[float, float], int]:
    """The range to draw and how many values lie above it: a lone spike must not flatten the rest."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    cut = low + 2.0 * (usual - low)
    if len(ordered) >= 20 and usual > low and high > low + 4 * (usual - low):
        high = cut
    low = min(0.0, low) if zero else low
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - pad, high + pad), sum(v > high for v in ordered)


def bucket(series: Series, most: int = POINTS) -> Series:
    """At most `most` points: each the mean of an equal piece of the line."""
    size = math.ceil(len(series.x) / most)
    if size <= 1:
        return series
    starts = range(0, len(series.x), size)

    def means(values: Values) -> list[float | None]:
        pieces = [[v for v in values[i : i + size] if v is not None] for i in starts]
        return [sum(p) / len(p) if p else None for p in pieces]

    x = [v for v in means(series.x) if v is not None]
    return replace(series, x=x, y=means(series.y), se=means(series.se) if series.se else ())


def smooth(y: Values, half: int) -> list[float | None]:
    """Centred moving average over 2·half + 1 points; a gap stays a gap."""
    out: list[float | None] = []
    for i, value in enumerate(y):
        near = [v for v in y[max(0, i - half) : i + half + 1] if v is not None]
        out.append(sum(near) / len(near) if value is not None else None)
    return out


def pieces(series: Series, frame: Frame, y: Values) -> list[list[tuple[float, float]]]:
    """The line's runs of known values, in places of the plot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, value in zip(series.x, y, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((frame.px(x), frame.py(value)))
    return [run for run in runs if run]


def path(points: Sequence[tuple[float, float]]) -> str:
    """`M…L…` with one decimal."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def band(series: Series, frame: Frame) -> str:
    """The area y ± se where both are known."""
    known = [
        (x, y, s)
        for x, y, s in zip(series.x, series.y, series.se or [None] * len(series.x), strict=True)
        if y is not None and s is not None
    ]
    if len(known) < 2:
        return ""
    upper = [(frame.px(x), frame.py(y + s)) for x, y, s in known]
    lower = [(frame.px(x), frame.py(y - s)) for x, y, s in reversed(known)]
    return f'<path class="band c{series.colour}" d="{path(upper + lower)}Z"/>'


def line(series: Series, frame: Frame, *, dots: bool, exact: bool) -> str:
    """Few points, or exact ones: the line itself. Many noisy ones: the points faint, their moving average strong."""
    many = not (dots or exact) and len(series.known) > 40
    strong = smooth(series.y, max(2, len(series.y) // 30)) if many else series.y
    raw = "".join(f'<path class="raw c{series.colour}" d="{path(p)}"/>' for p in pieces(series, frame, series.y)) if many else ""
    runs = pieces(series, frame, strong)
    lines = "".join(f'<path class="line c{series.colour}" d="{path(p)}"/>' for p in runs)
    lone = [p[0] for p in runs if len(p) == 1]
    marks = [point for run in runs for point in run] if dots and len(series.known) <= 60 else lone
    return raw + lines + "".join(f'<circle class="dot c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in marks)


def axes(frame: Frame, x_name: str, tick: Callable[[float], str] = short) -> str:
    """Horizontal grid lines with their values, and the values of the horizontal axis."""
    out = []
    for v in nice_ticks(*frame.y):
        y = frame.py(v)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick(v)}</text>')
    base = HEIGHT - BOTTOM
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for v in nice_ticks(*frame.x, most=5):
        out.append(f'<text class="tick" x="{frame.px(v):.1f}" y="{base + 14}" text-anchor="middle">{short(v)}</text>')
    out.append(f'<text class="tick name" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(out)


def svg(slug: str, title: str, description: str, body: str, *, extra: str = "") -> str:
    """A plot that scales with its place, named and described for those who don't see it."""
    ids = f"{escape(slug)}-title {escape(slug)}-desc"
    names = f'<title id="{escape(slug)}-title">{escape(title)}</title><desc id="{escape(slug)}-desc">{escape(description)}</desc>'
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{ids}"{extra}>{names}{body}</svg>'


def in_words(series: Sequence[Series], unit: str) -> str:
    """Where each line starts and ends."""
    ends = [f"{s.label}: {short(s.known[0])} at first, {short(s.known[-1])} at last" for s in series if s.known]
    return "; ".join(ends) + f" ({unit})."


def line_plot(
    series: Sequence[Series], *, slug: str, title: str, unit: str, zero: bool = True, dots: bool = False, exact: bool = False
) -> str:
    """Lines over training steps with shaded standard errors. Empty string when nothing is known."""
    drawn = [bucket(s) for s in series if s.known]
    if not drawn:
        return ""
    tops = [y + (e or 0) for s in drawn for y, e in zip(s.y, s.se or [None] * len(s.y), strict=True) if y is not None]
    lows = [y - (e or 0) for s in drawn for y, e in zip(s.y, s.se or [None] * len(s.y), strict=True) if y is not None]
    vertical, above = y_range(tops + lows if any(s.se for s in drawn) else tops, zero=zero)
    xs = [x for s in drawn for x in s.x]
    frame = Frame((min(xs), max(xs)), vertical)
    body = axes(frame, "step") + "".join(band(s, frame) for s in drawn) + "".join(line(s, frame, dots=dots, exact=exact) for s in drawn)
    if above:
        note = f"{above} point{'s' if above > 1 else ''} above, up to {short(max(tops))}"
        body += f'<text class="tick" x="{WIDTH - RIGHT}" y="{TOP + 3}" text-anchor="end">{note}</text>'
    body += f'<line class="cross" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return svg(slug, title, in_words(series, unit), body, extra=f' data-plot="{escape(plot_data(drawn, frame))}"')


def trail_plot(series: Sequence[Series], *, slug: str, title: str, x_name: str) -> str:
    """What one number does while another changes: each line joins its points in their own order, a ring at the first one."""
    drawn = [s for s in series if s.known and len(s.known) == len(s.x)]
    if not drawn:
        return ""
    xs, ys = [x for s in drawn for x in s.x], [y for s in drawn for y in s.known]
    pad = (max(xs) - min(xs)) * 0.06 or abs(max(xs)) * 0.1 or 1.0
    frame = Frame((min(xs) - pad, max(xs) + pad), y_range(ys, zero=False)[0])
    body = [axes(frame, x_name)]
    for s in drawn:
        places = [(frame.px(x), frame.py(y)) for x, y in zip(s.x, s.known, strict=True)]
        body.append(f'<path class="line c{s.colour}" d="{path(places)}"/>')
        body += [f'<circle class="dot c{s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places[1:]]
        body.append(f'<circle class="hollow c{s.colour}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3.2"/>')
    ends = [f"{s.label}: from {short(s.x[0])}, {short(s.known[0])} to {short(s.x[-1])}, {short(s.known[-1])}" for s in drawn]
    return svg(slug, title, "; ".join(ends) + ".", "".join(body))


def plot_data(series: Sequence[Series], frame: Frame) -> str:
    """What the reading line under the pointer needs, as JSON."""

    def brief(values: Values) -> list[float | None]:
        return [None if v is None else float(f"{v:.4g}") for v in values]

    lines = [{"name": s.label, "x": brief(s.x), "y": brief(s.y), "se": brief(s.se)} for s in series]
    return json.dumps({"range": frame.x, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "lines": lines}, separators=(",", ":"))


def at(x: Sequence[float], y: Sequence[float], where: float) -> float:
    """Linear interpolation of a curve with rising x."""
    for (x0, y0), (x1, y1) in zip(zip(x, y, strict=True), list(zip(x, y, strict=True))[1:], strict=False):
        if x0 <= where <= x1:
            return y0 + (y1 - y0) * ((where - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return y[-1]


def mass_plot(tokens: Sequence[float], mass: Sequence[float], *, slug: str = "mass", share: float = 10) -> str:
    """Percentage of the visual advantage that the top percentage of tokens holds; the dashed diagonal is an even spread."""
    if len(tokens) < 2:
        return ""
    frame = Frame((0.0, 100.0), (0.0, 100.0))
    held = at(tokens, mass, share)
    x, y, base = frame.px(share), frame.py(held), HEIGHT - BOTTOM
    points = [(frame.px(a), frame.py(b)) for a, b in zip(tokens, mass, strict=True)]
    area = path([*points, (frame.px(100), base), (frame.px(0), base)]) + "Z"
    words = f"top {share:g} % of tokens: {held:.1f} % of the mass"
    body = (
        axes(frame, "% of tokens, highest visual advantage first")
        + f'<path class="diagonal" d="{path([(frame.px(0), frame.py(0)), (frame.px(100), frame.py(100))])}"/>'
        + f'<path class="band c1" d="{area}"/><path class="line c1" d="{path(points)}"/>'
        + f'<path class="mark" d="M{x:.1f} {base}V{y:.1f}H{LEFT}"/><circle class="dot c1" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        + f'<text class="label" x="{x + 12:.1f}" y="{min(y + 24, base - 8):.1f}">{words}</text>'
    )
    return svg(slug, "Concentration of visual advantage", f"The {words}.", body)


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot: a value with its interval; `hollow` are further marks on the same line."""

    label: str
    value: float
    low: float
    high: float
    text: str
    colour: str = "c0"
    hollow: tuple[float, ...] = ()


ROW = 46


def dot_plot(rows: Sequence[Dot], *, slug: str, title: str, unit: str, low: float, high: float) -> str:
    """One line per row from `low` to `high`, label and value above it. Places are percentages, so texts keep their size on a phone."""
    if not rows:
        return ""

    def place(value: float) -> str:
        return f"{1.5 + 97 * min(max((value - low) / (high - low), 0.0), 1.0):.2f}%"

    height = ROW * len(rows) + 26
    marks = nice_ticks(low, high, 5)
    out = []
    for i, row in enumerate(rows):
        y = ROW * i + 32
        out.append(f'<text class="row" x="0" y="{y - 15}">{escape(row.label)}</text>')
        out.append(f'<text class="row value" x="100%" y="{y - 15}" text-anchor="end">{escape(row.text)}</text>')
        out.append(f'<line class="axis" x1="{place(low)}" x2="{place(high)}" y1="{y}" y2="{y}"/>')
        out += [
            f'<line class="{"zero" if v == 0 > low else "grid"}" x1="{place(v)}" x2="{place(v)}" y1="{y - 8}" y2="{y + 8}"/>' for v in marks
        ]
        out += [f'<circle class="hollow {row.colour}" cx="{place(v)}" cy="{y}" r="4"/>' for v in row.hollow]
        out.append(f'<line class="whisker {row.colour}" x1="{place(row.low)}" x2="{place(row.high)}" y1="{y}" y2="{y}"/>')
        out.append(f'<circle class="point {row.colour}" cx="{place(row.value)}" cy="{y}" r="5.5"/>')
    for v in marks:
        anchor = "start" if v == low else "end" if v == high else "middle"
        out.append(f'<text class="tick" x="{place(v)}" y="{height - 8}" text-anchor="{anchor}">{short(v)}</text>')
    words = "; ".join(f"{r.label}: {r.text}" for r in rows)
    names = (
        f'<title id="{escape(slug)}-title">{escape(title)}</title><desc id="{escape(slug)}-desc">{escape(words)} ({escape(unit)}).</desc>'
    )
    ids = f"{escape(slug)}-title {escape(slug)}-desc"
    return f'<svg class="dots" width="100%" height="{height}" role="img" aria-labelledby="{ids}">{names}{"".join(out)}</svg>'
