"""Pictures of samples.jsonl as data URIs: only files inside the run's folder, only real images, never large."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

KEPT_BYTES = 32_000  # a PNG up to this size is embedded as it is, a larger one as WebP
MOST_BYTES, MOST_PIXELS, SIDE = 20_000_000, 16_000_000, 448
SMALL_SIDE = 160  # at most this wide or high: enlarged without smoothing


@dataclass(frozen=True)
class Picture:
    """An image ready for `src=`; `small` means that its pixels are to stay visible when it is enlarged."""

    uri: str
    small: bool


def inside(folder: Path, name: object) -> Path | None:
    """The file that `name` means, if it lies inside `folder` (links resolved) and is a file of sensible size."""
    if not isinstance(name, str) or not name:
        return None
    try:
        path = (Path(folder) / name).resolve()
        inside_folder = path.is_relative_to(Path(folder).resolve())
        return path if inside_folder and path.is_file() and path.stat().st_size <= MOST_BYTES else None
    except (OSError, ValueError):
        return None


def embed(folder: Path, name: object) -> Picture | None:
    """The picture as a data URI, or None when it is missing, outside the folder, or no image."""
    path = inside(folder, name)
    if path is None:
        return None
    raw = path.read_bytes()
    try:
        with Image.open(io.BytesIO(raw), formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            image.load()
            small = max(image.size) <= SMALL_SIDE
            if len(raw) <= KEPT_BYTES:
                return Picture("data:image/png;base64," + base64.b64encode(raw).decode(), small)
            return Picture("data:image/webp;base64," + base64.b64encode(shrink(image)).decode(), small)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow reports broken PNG chunks as SyntaxError
        return None


def shrink(image: Image.Image) -> bytes:
    """At most `SIDE` pixels a side, as WebP."""
    copy = image.convert("RGB")
    copy.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    copy.save(out, "WEBP", quality=82)
    return out.getvalue()
