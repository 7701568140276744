"""A page of pictures of the built-in world, one row a knob: `python -m vaopd.world.pictures FILE.png`."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vaopd.config import WorldConfig
from vaopd.views import pixelate
from vaopd.world.questions import sample_figure

TILE, GAP, CAPTION, COLUMNS = 128, 12, 22, 5
ROWS: tuple[tuple[str, Mapping[str, Any], bool], ...] = (
    ("as it is", {}, False),
    ("pixelated", {}, True),
    ("labels: 4", {"labels": 4}, False),
    ("labels: 5", {"labels": 5}, False),
    ("label_size: 10", {"label_size": 10}, False),
    ("label_size: 18", {"label_size": 18}, False),
    ("grain: 30", {"grain": 30}, False),
    ("grain: 60", {"grain": 60}, False),
)


def contact_sheet() -> Image.Image:
    """The same five figures with one knob turned at a time; a caption to the left of each row."""
    left = 110
    sheet = Image.new("RGB", (left + COLUMNS * (TILE + GAP), GAP + len(ROWS) * (TILE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, (caption, knobs, degraded) in enumerate(ROWS):
        y = GAP + row * (TILE + GAP)
        pen.text((GAP, y + TILE / 2), caption, fill="#1d2025", font=font, anchor="lm")
        for column in range(COLUMNS):
            picture = sample_figure(random.Random(f"picture {column}"), WorldConfig(**knobs)).image
            shown = pixelate(picture) if degraded else picture
            sheet.paste(shown.resize((TILE, TILE), Image.Resampling.NEAREST), (left + column * (TILE + GAP), y))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a page of pictures of the built-in world.")
    parser.add_argument("file", type=Path)
    contact_sheet().save(parser.parse_args().file, optimize=True)
