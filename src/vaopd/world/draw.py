"""The pictures of the built-in world: a polygon in chalk on a dark board, its side lengths written beside its sides."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels; a tiny vision tower of patch 8 and merge 2 sees 16 image tokens
BOARD = (24, 32, 38)  # the background; the models' image mean, so that it maps to zero
CHALK = ((236, 226, 160), (160, 214, 236), (236, 176, 160), (176, 228, 172))
LABEL = (255, 255, 255)
LABEL_DISTANCE = 8  # pixels between a side's middle and its label's


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw_polygon(rng: random.Random, labels: Sequence[int], *, label_size: int = 14, grain: float = 0.0) -> Image.Image:
    """A polygon with its side lengths written outside the sides' middles, left to right in the order of `labels`.

    Args:
        rng: of place, size, turn and colour.
        label_size: points of Pillow's own font; at 14 a label is about 8 x 10 pixels.
        grain: standard deviation of the noise of every pixel and channel, in grey levels of 255.
    """
    image = Image.new("RGB", (SIDE, SIDE), BOARD)
    pen = ImageDraw.Draw(image)
    centre_x, centre_y = SIDE / 2 + rng.uniform(-3, 3), SIDE / 2 + rng.uniform(-3, 3)
    radius, turn = rng.uniform(17, 22), -math.pi / 2 + rng.uniform(-0.15, 0.15)
    angles = [turn + corner * 2 * math.pi / len(labels) + rng.uniform(-0.1, 0.1) for corner in range(len(labels))]
    corners = [(centre_x + radius * math.cos(angle), centre_y + radius * math.sin(angle)) for angle in angles]
    pen.polygon(corners, outline=rng.choice(CHALK))
    for label, place in zip(labels, _label_places(corners, centre_x, centre_y), strict=True):
        pen.text(place, str(label), fill=LABEL, font=_font(label_size), anchor="mm")
    return _grainy(image, grain) if grain else image


def _label_places(corners: Sequence[tuple[float, float]], centre_x: float, centre_y: float) -> list[tuple[float, float]]:
    places = []
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
        away_x, away_y = middle_x - centre_x, middle_y - centre_y
        norm = math.hypot(away_x, away_y)
        places.append((middle_x + away_x / norm * LABEL_DISTANCE, middle_y + away_y / norm * LABEL_DISTANCE))
    return sorted(places)


def _grainy(image: Image.Image, grain: float) -> Image.Image:
    # Seeded by the picture itself: the questions that follow in a stream of random numbers are the same with and without grain.
    noise = np.random.default_rng(zlib.crc32(image.tobytes())).normal(0, grain, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))
