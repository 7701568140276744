"""The one decoder: every pixel that a model sees goes through `decode`, so student and teacher see the same.

What it settles once: EXIF orientation is applied, transparency is laid on white, every colour mode becomes 8-bit RGB (16-bit values
keep their high byte, CMYK is converted without colour management). Only JPEG, PNG and WebP are read, told by content and not by name.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vaopd.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 40_000_000  # 120 MB as RGB; a 24-megapixel photograph passes
MAX_BYTES = 200_000_000  # of an encoded image; no real one within MAX_PIXELS is larger
STRIP = 65_536  # pixels that are hashed at a time


def decode(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A path or the bytes of an encoded image -> an upright, opaque 8-bit RGB image.

    The size in the header is checked against `max_pixels` before any pixel is decoded. Raises `DataError` with reason and fix for
    anything that isn't one whole JPEG, PNG or WebP image within the limit.
    """
    name = "the image" if isinstance(source, bytes) else f"image '{source}'"
    data = _read(source, name)
    _refuse_bomb(_webp_size(data), max_pixels, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_bomb(image.size, max_pixels, name)
            _refuse_animation(image, name)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"{name} is no JPEG, PNG or WebP ({_describe(data)}). Convert it to one of these.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name} has too many pixels; at most {max_pixels:,} are decoded. Scale it down.") from None
    except Exception as error:  # hostile bytes make Pillow raise almost anything; all of it means the same to a user
        raise DataError(f"{name} is damaged or cut off ({error}). Export or download it again.") from error


def content_hash(image: Image.Image) -> str:
    """Hex sha256 of a decoded image's mode, size and pixels: equal exactly when the model is shown the same picture."""
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\n".encode())
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):  # strips stay in the processor's cache; a photograph's bytes at once are new memory each time
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return digest.hexdigest()


def png_bytes(image: Image.Image) -> bytes:
    """The image encoded as PNG, without loss: `decode(png_bytes(image))` gives the pixels of an RGB image back."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _read(source: Path | bytes, name: str) -> bytes:
    if isinstance(source, bytes):
        data, size = source, len(source)
    elif not source.is_file():  # neither missing files nor devices and pipes, which could block or never end
        raise DataError(f"{name} does not exist or is no ordinary file. Check the path.")
    else:
        try:
            size = source.stat().st_size
            data = source.read_bytes() if size <= MAX_BYTES else b""
        except OSError as error:
            raise DataError(f"{name} can't be read ({error.strerror}). Check its permissions.") from error
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size:,} bytes; at most {MAX_BYTES:,} are read. Scale it down.")
    if not data:
        raise DataError(f"{name} is empty (0 bytes). Export or download it again.")
    return data


def _refuse_bomb(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(f"{name} is {width}x{height} = {width * height:,} pixels; at most {max_pixels:,} are decoded. Scale it down.")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) from a WebP header, (0, 0) for other data: Pillow allocates the whole canvas when it opens a WebP."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _refuse_animation(image: Image.Image, name: str) -> None:
    # A phone's multi-picture JPEG ("MPO") has one main picture, the rest are previews; frames of an animation are equals.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{name} is an animation of {image.n_frames} frames. Save the frame you mean as its own file.")  # type: ignore[attr-defined]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that the three formats decode to -> RGB, transparency on white."""
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # converting copies in any case
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey (with alpha where a grey value is marked transparent); Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int32)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _describe(data: bytes) -> str:
    """What the first bytes look like, for the message."""
    known = {
        b"GIF8": "a GIF",
        b"BM": "a BMP",
        b"%PDF": "a PDF",
        b"II*\0": "a TIFF",
        b"MM\0*": "a TIFF",
        b"<svg": "an SVG",
        b"<": "HTML or XML",
    }
    for magic, kind in known.items():
        if data.startswith(magic):
            return f"it looks like {kind}"
    return f"it starts with {data[:8]!r}"
