"""Visual advantage as colour: the scale, hostile text made visible, a rollout's tokens as spans, and a standalone picture."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from vaopd.report.pictures import Picture, embed
from vaopd.report.read import Json, items, number

LEVELS = 12  # shades above "none"
SHOWN_TOKENS = 800  # of one rollout
TOKEN_CHARACTERS = 80
CELL, PITCH = 9.0, 27  # a monospaced cell and a row of the standalone picture, in pixels
SANS = "system-ui,-apple-system,Segoe UI,sans-serif"
PICTURE_CSS = (
    "text{font:15px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1d2025}"
    f".s{{font:12px {SANS};fill:#5c6370}}.q{{font:600 15px {SANS}}}"
)
KEPT = {"\n", "\t", "\u200c", "\u200d"}  # joiners are spelling in several scripts and in emoji

Lab = tuple[float, float, float]
# OKLab ends of the two scales: (page, full) for light and dark. One hue each, lightness strictly monotone, text readable at every shade.
ENDS: dict[str, dict[str, tuple[Lab, Lab]]] = {
    "va": {"light": ((1.0, 0.0, 0.0), (0.72, 0.10, 0.13)), "dark": ((0.235, 0.0, -0.006), (0.74, 0.085, 0.115))},
    "kl": {"light": ((1.0, 0.0, 0.0), (0.70, -0.055, -0.115)), "dark": ((0.235, 0.0, -0.006), (0.72, -0.045, -0.105))},
}
INKS = ("#1d2025", "#e8e8e6")  # the page's own text colours
HARD_INKS = ("#000000", "#ffffff")  # where neither stands out enough
ENOUGH = 4.5  # contrast of text, WCAG 2 AA


def srgb(lab: Lab) -> tuple[float, float, float]:
    """OKLab (Ottosson 2020) to gamma-encoded sRGB, clipped to [0, 1]."""
    light, a, b = lab
    l3 = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m3 = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s3 = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * l3 - 3.3077115913 * m3 + 0.2309699292 * s3,
        -1.2684380046 * l3 + 2.6097574011 * m3 - 0.3413193965 * s3,
        -0.0041960863 * l3 - 0.7034186147 * m3 + 1.7076147010 * s3,
    )
    gamma = [12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (min(max(c, 0.0), 1.0) for c in linear)]
    return gamma[0], gamma[1], gamma[2]


def shades(scale: str, theme: str) -> list[str]:
    """`LEVELS` + 1 colours, equal steps in OKLab from the page's colour to the full one."""
    low, high = ENDS[scale][theme]
    steps = [i / LEVELS for i in range(LEVELS + 1)]
    mixed = [(low[0] + t * (high[0] - low[0]), low[1] + t * (high[1] - low[1]), low[2] + t * (high[2] - low[2])) for t in steps]
    return ["#" + "".join(f"{round(c * 255):02x}" for c in srgb(lab)) for lab in mixed]


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2), from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable(colour: str) -> str:
    """The text colour that stands out more from this shade."""
    soft, hard = (max(inks, key=lambda ink: contrast(ink, colour)) for inks in (INKS, HARD_INKS))
    return soft if contrast(soft, colour) >= ENOUGH else hard


def scale_css() -> str:
    """Rules for the classes `v0…` (visual advantage) and `k0…` (KL); the latter hold while the page shades by KL."""
    rules: dict[str, list[str]] = {"light": [], "dark": []}
    for theme, out in rules.items():
        for letter, scale, where in (("v", "va", ""), ("k", "kl", "body:has(#by-kl:checked) ")):
            for i, colour in enumerate(shades(scale, theme)):
                ink = readable(colour)
                out.append(f"{where}.{letter}{i}{{background:{colour};color:{ink}}}")
    light, dark = "".join(rules["light"]), "".join(rules["dark"])
    return f"{light}@media screen and (prefers-color-scheme:dark){{{dark}}}"


def level(value: float | None, cap: float) -> int:
    """The shade of a value in nats: the square root keeps small values apart from none; `cap` and above share the last."""
    if value is None or value <= 0:
        return 0
    return min(LEVELS, round(LEVELS * math.sqrt(value / cap)))


def nice_cap(values: Iterable[float]) -> float:
    """A round number that 98 % of the positive values stay under; at least half a nat, so that noise stays pale."""
    positive = sorted(v for v in values if v > 0)
    top = max(0.5, positive[int(0.98 * (len(positive) - 1))]) if positive else 1.0
    size = 10.0 ** math.floor(math.log10(top))
    return next(step * size for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * size >= top * 0.999)


def ticks(cap: float) -> list[tuple[int, str]]:
    """(level, value in nats) for the legend."""
    marks = [(i, cap * (i / LEVELS) ** 2) for i in range(0, LEVELS + 1, 3)]
    return [(i, f"{'≥ ' if i == LEVELS else ''}{value:.2g}") for i, value in marks]


def visible(text: object) -> str:
    """Text with everything that is invisible or reorders its neighbours spelled out (`⟨U+202E⟩`); newlines and tabs stay."""
    plain = str(text)
    if plain.isprintable():
        return plain
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return "".join(f"⟨U+{ord(c):04X}⟩" if c not in KEPT and unicodedata.category(c) in hidden else c for c in plain)


def clip(text: object, limit: int) -> str:
    """The first `limit` characters, saying how many are missing."""
    plain = str(text)
    return plain if len(plain) <= limit else f"{plain[:limit]}… (+{len(plain) - limit:,} characters)"


def one_line(text: str, limit: int) -> str:
    """The text on one line, cut with an ellipsis where it is longer than `limit` characters."""
    plain = visible(" ".join(text.split()))
    return plain if len(plain) <= limit else f"{plain[: limit - 1]}…"


def token_text(token: object) -> str:
    """A token as shown: controls visible, a newline marked and kept, an empty token (part of a character) as `∅`."""
    return visible(clip(token, TOKEN_CHARACTERS)).replace("\n", "↵\n").replace("\t", "⇥") or "∅"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits, `–` for none."""
    return "–" if value is None else f"{value:.{digits}g}".replace("e-0", "e-").replace("-", "−")


@dataclass(frozen=True)
class Token:
    """One response token with its scores: nats for `va` and `kl`, probabilities for the models, `times` in uniform weights."""

    text: str
    va: float | None
    kl: float | None
    teacher: float | None
    degraded: float | None
    student: float | None
    coefficient: float | None
    times: float | None

    @property
    def scores(self) -> str:
        """The token's scores in words: the tooltip, also without scripts (the script reads it by position)."""
        values = (self.va, self.kl, self.teacher, self.degraded, self.student, self.coefficient, self.times)
        va, kl, teacher, degraded, student, coefficient, times = map(significant, values)
        return f"VA {va} · KL {kl} · teacher {teacher} → {degraded} · student {student} · coefficient {coefficient} = {times} × uniform"


def probability(logp: float | None) -> float | None:
    """exp, capped at 1 (a rounding error above it is no information)."""
    return None if logp is None else math.exp(min(logp, 0.0))


def column(rollout: Json, key: str, length: int) -> list[float | None]:
    """One list of a rollout as numbers, exactly `length` long: a missing, short or null list is filled with None."""
    values = [number(v) for v in items(rollout.get(key))][:length]
    return values + [None] * (length - len(values))


def read_tokens(rollout: Json, siblings: int) -> list[Token]:
    """All tokens of a rollout; `siblings` is K, for the uniform weight 1/(K·T)."""
    tokens = items(rollout.get("tokens"))
    keys = ("va", "kl", "logp_teacher", "logp_degraded", "logp_student", "coefficient")
    va, kl, teacher, degraded, student, coefficient = (column(rollout, key, len(tokens)) for key in keys)
    uniform = 1 / max(1, siblings * len(tokens))
    return [
        Token(
            str(t),
            va[i],
            kl[i],
            probability(teacher[i]),
            probability(degraded[i]),
            probability(student[i]),
            c,
            None if c is None else c / uniform,
        )
        for i, (t, c) in enumerate(zip(tokens, coefficient, strict=True))
    ]


def spans(tokens: Sequence[Token], cap_va: float, cap_kl: float) -> Markup:
    """One `<span>` per token, shaded by class; the text is escaped."""
    one = Markup('<span class="v{} k{}" title="{}">{}</span>')
    return Markup("").join(one.format(level(t.va, cap_va), level(t.kl, cap_kl), t.scores, token_text(t.text)) for t in tokens)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def cells(text: str) -> int:
    """Width in monospaced cells: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(texts: Sequence[str], columns: int) -> list[tuple[int, int, int]]:
    """(row, column, width) of each token in a grid; a token that ends in a newline ends its row."""
    places, row, at = [], 0, 0
    for text in texts:
        width = min(cells(text.replace("\n", "")), columns)
        if at and at + width > columns:
            row, at = row + 1, 0
        places.append((row, at, width))
        row, at = (row + 1, 0) if text.endswith("\n") else (row, at + width)
    return places


def picture_tag(picture: Picture | None, x: int, name: str) -> str:
    """A 150-pixel square of the standalone picture: the embedded image with its caption, or a frame that says it is missing."""
    caption = f'<text x="{x + 75}" y="206" text-anchor="middle" class="s">{escape(name)}</text>'
    if picture is None:
        missing = f'<text x="{x + 75}" y="116" text-anchor="middle" class="s">missing</text>'
        return f'<rect x="{x}" y="36" width="150" height="150" fill="#eee"/>{missing}{caption}'
    crisp = ' style="image-rendering:pixelated"' if picture.small else ""
    return f'<image x="{x}" y="36" width="150" height="150"{crisp} href="{picture.uri}"/>{caption}'


def legend_svg(cap: float, x: float, y: float) -> str:
    """The colour scale with its values in nats, 260 wide."""
    patches = "".join(f'<rect x="{x + i * 15}" y="{y}" width="15" height="9" fill="{c}"/>' for i, c in enumerate(shades("va", "light")))
    labels = "".join(f'<text x="{x + i * 15 + 7.5}" y="{y + 22}" text-anchor="middle" class="s">{t}</text>' for i, t in ticks(cap))
    return f'{patches}{labels}<text x="{x + 208}" y="{y + 9}" class="s">nats</text>'


def token_tags(tokens: Sequence[Token], texts: Sequence[str], cap: float, left: int, columns: int) -> tuple[str, int]:
    """The shaded tokens of the standalone picture on a grid of monospaced cells, and how many rows they take."""
    places, colours, out = wrap(texts, columns), shades("va", "light"), []
    for token, text, (row, at, cell) in zip(tokens, texts, places, strict=True):
        x, y, width = left + at * CELL, 92 + row * PITCH, cell * CELL
        colour = colours[level(token.va, cap)]
        out.append(f'<rect x="{x:g}" y="{y - 16}" width="{width:g}" height="22" rx="2" fill="{colour}"/>')
        fit = f'textLength="{width:g}" lengthAdjust="spacingAndGlyphs" xml:space="preserve"'
        out.append(f'<text x="{x:g}" y="{y}" {fit}>{escape(text[:columns].rstrip(chr(10)))}</text>')
    return "".join(out), max((p[0] for p in places), default=0) + 1


def heat_map_svg(sample: Json, folder: Path, *, rollout: int = 0, title: str = "", width: int = 880) -> str:
    """A standalone picture of one row of samples.jsonl: image | degraded view | the rollout shaded by visual advantage.

    `folder` is the run's folder, which the row's picture paths are relative to. Scripts, fonts and other files are not needed: it
    works as an `<img>`, on light and dark pages (it brings its own light card). At most `SHOWN_TOKENS` tokens are drawn.
    """
    rollouts = [r for r in items(sample.get("rollouts")) if isinstance(r, dict)]
    tokens = read_tokens(rollouts[rollout], len(rollouts))[:SHOWN_TOKENS] if -len(rollouts) <= rollout < len(rollouts) else []
    cap = nice_cap(t.va for t in tokens if t.va is not None)
    left = 362
    shaded, rows = token_tags(tokens, [token_text(t.text) for t in tokens], cap, left, int((width - left - 24) / CELL))
    height = max(226, 140 + PITCH * rows)
    views = next((v for v in items(sample.get("images")) if isinstance(v, dict)), {})
    original, degraded = (embed(folder, views.get(key)) for key in ("original", "degraded"))
    question = escape(one_line(str(sample.get("problem", "")).replace("<image>", ""), 54))
    heading = escape(visible(title) or "Shade: how much likelier the teacher finds the token with the image")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>Heat map of visual advantage</title><desc>{heading}. Question: {question}</desc><style>{PICTURE_CSS}</style>"
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" fill="#fff" stroke="#d8d9dc"/>'
        f"{picture_tag(original, 24, 'image')}{picture_tag(degraded, 188, 'degraded view')}"
        f'<text x="{left}" y="34" class="q">{question}</text><text x="{left}" y="56" class="s">{heading}</text>'
        f"{shaded}{legend_svg(cap, left, height - 42)}</svg>"
    )
