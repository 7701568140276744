"""One answer as a page of its own: the pictures in both views and the tokens shaded by visual advantage."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from vaopd.report.heat import LEVELS, nice_cap, scale_css, ticks
from vaopd.report.page import TEMPLATES, digest, environment, save
from vaopd.report.pictures import SIDE, SMALL_SIDE, Picture
from vaopd.report.read import Json
from vaopd.report.samples import rollout_view

Views = tuple[Image.Image, Image.Image]  # the image, and its degraded view


def write_answer(sample: Json, pictures: Sequence[Views], out: Path) -> Path:
    """Write the page; returns where.

    Args:
        sample: as a row of samples.jsonl with one rollout, and the names of `student` and `teacher`.
        pictures: each image of the question in both views.
    """
    return save(answer_page(sample, pictures), out)


def answer_page(sample: Json, pictures: Sequence[Views]) -> str:
    """The HTML: one file without scripts, fonts or other files; every text in it is escaped, what is invisible is spelled out."""
    rollout = sample["rollouts"][0]
    caps = nice_cap(rollout["va"]), nice_cap(rollout.get("kl", []))
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8") + scale_css()
    policy = f"default-src 'none'; img-src data:; style-src {digest(css)}; base-uri 'none'; form-action 'none'"
    page = environment().get_template("answer.html")
    return page.render(
        css=Markup(css),
        policy=Markup(policy),
        levels=LEVELS,
        samples={"ticks": {"v": ticks(caps[0]), "k": ticks(caps[1])}},
        sample=sample,
        answer=rollout_view(rollout, 1, caps),
        pictures=[(picture_of(original), picture_of(degraded)) for original, degraded in pictures],
    )


def picture_of(image: Image.Image) -> Picture:
    """An image as a data URI, at most `SIDE` pixels a side."""
    copy = image.convert("RGB")
    copy.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    copy.save(buffer, "PNG")
    return Picture("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), max(image.size) <= SMALL_SIDE)
