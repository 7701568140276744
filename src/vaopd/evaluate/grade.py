"""Whether a response gives the right answer: its final answer is found and compared by rule, without a judge."""

from __future__ import annotations

import re
from fractions import Fraction

from vaopd.data.formats import last_boxed

_ANSWER = re.compile(r"answer[\s*]*(?:is\b|[:=])(?:is\b|[\s:=*])*", re.IGNORECASE)
# A comma stands between groups of three digits; `3,5` is no number.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?|[-+]?\.\d+")
_FRACTION = re.compile(r"(?<!\d)\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")  # not in 1\frac{1}{2}, which is 3/2
_ARTICLES = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def is_correct(response: str, answer: str) -> bool:
    """Whether the response's final answer equals `answer`: as numbers where both are numbers, else as words, ignoring case and articles."""
    given, wanted = final_answer(response), _bare(answer)
    given_number, wanted_number = _as_number(given), _as_number(wanted)
    if wanted_number is not None:
        return given_number is not None and _close(given_number, wanted_number)
    return given.casefold() == wanted.casefold()


def final_answer(response: str) -> str:
    r"""What a response answers: the last `\boxed{…}`, else what follows the last "answer is", else the last number, else all of it."""
    boxed = last_boxed(response)
    if boxed is not None:
        return _bare(boxed)
    said = list(_ANSWER.finditer(response))
    if said:
        return _bare(_first_sentence(response[said[-1].end() :]))
    numbers = _NUMBER.findall(response)
    return _bare(numbers[-1] if numbers else response)


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence; `3.5` goes on."""
    return re.split(r"[.!?](?:\s|$)|\n", text, maxsplit=1)[0]


def _bare(text: str) -> str:
    r"""Without surrounding space, quotes, dollar signs, a closing stop or an article; `\frac{1}{2}` as `1/2`."""
    text = text.strip().strip("$\"'`* ").rstrip(".").strip()
    return " ".join(_ARTICLES.sub("", _FRACTION.sub(r"\1/\2", text)).split())


def _as_number(text: str) -> Fraction | None:
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(re.sub(r"[,\s]", "", text)) if "." not in text.partition("/")[2] else None
    except (ValueError, ZeroDivisionError):
        return None


def _close(a: Fraction, b: Fraction) -> bool:
    """Equal up to rounding in the sixth significant digit."""
    return abs(a - b) <= Fraction(1, 10**6) * max(abs(a), abs(b))
