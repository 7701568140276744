"""Views: an image with less detail, the same size (the paper's degraded image ṽ).

A view is one function `(image, *, shown_size, **options) -> image` and one line in `VIEWS`; a recipe names it. The result has the
size of the input, so both views give the processor the same grid and the prompt the same ids.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Protocol

from PIL import Image

from vaopd.errors import ConfigError, did_you_mean

Size = tuple[int, int]  # (width, height) in pixels

RESOLUTIONS = ("original", "shown", "lowest")


class View(Protocol):
    """A view with its options filled in, as the renderer calls it."""

    def __call__(self, image: Image.Image, *, shown_size: Size | None = None) -> Image.Image:
        """RGB image of the same size. `shown_size`: what the image processor resizes this image to, None if unknown."""
        ...


def pixelate(
    image: Image.Image,
    ratio: float = 0.1,
    *,
    resolution: str = "original",
    shown_size: Size | None = None,
) -> Image.Image:
    """The paper's degradation: bilinear down to `max(1, int(side * ratio))` per side, nearest back up; RGB, same size.

    `resolution` says whose sides the ratio refers to: the image's own pixels ("original"), the pixels that the processor shows
    the model ("shown"), or the smaller of the two per side ("lowest"). An image is never enlarged on the way down: where the
    shown sides times the ratio exceed the image's own, it comes back as it is.

    Raises `ConfigError` for a ratio outside (0, 1], an unknown resolution, or a `shown_size` that is needed and not known.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"pixelate: ratio must be above 0 and at most 1, got {ratio}. The paper uses 0.1.")
    rgb = image.convert("RGB")  # first: Pillow silently ignores bilinear on palette and 1-bit images
    reference = _reference_size(rgb.size, resolution, shown_size)
    small = tuple(min(side, max(1, int(wanted * ratio))) for side, wanted in zip(rgb.size, reference, strict=True))
    return rgb.resize(small, Image.Resampling.BILINEAR).resize(rgb.size, Image.Resampling.NEAREST)  # type: ignore[arg-type]


def _reference_size(size: Size, resolution: str, shown_size: Size | None) -> Size:
    """The (width, height) that a ratio refers to."""
    if resolution not in RESOLUTIONS:
        hint = did_you_mean(str(resolution), RESOLUTIONS)
        raise ConfigError(f"resolution must be one of {', '.join(RESOLUTIONS)}, got {resolution!r}.{hint}")
    if resolution == "original":
        return size
    if shown_size is None:
        raise ConfigError(
            f"resolution {resolution!r} needs the size that the image processor shows, which this one does not tell; use 'original'."
        )
    if resolution == "shown":
        return shown_size
    return min(size[0], shown_size[0]), min(size[1], shown_size[1])


VIEWS: dict[str, Callable[..., Image.Image]] = {
    "pixelate": pixelate,
}


def view(name: str = "pixelate", **options: object) -> View:
    """The named view with its options filled in, checked at once.

    Raises `ConfigError` for an unknown name, an unknown option, or a value that the view refuses.
    """
    if name not in VIEWS:
        raise ConfigError(f"unknown view {name!r}; known: {', '.join(VIEWS)}.{did_you_mean(name, VIEWS)}")
    known = [option for option in inspect.signature(VIEWS[name]).parameters if option not in ("image", "shown_size")]
    for option in options:
        if option not in known:
            raise ConfigError(f"view {name!r} has no option {option!r}; it has: {', '.join(known)}.{did_you_mean(option, known)}")
    filled: View = functools.partial(VIEWS[name], **options)
    try:
        filled(Image.new("RGB", (2, 2)), shown_size=(2, 2))
    except TypeError as error:
        raise ConfigError(f"view {name!r}: an option has the wrong type: {error}") from error
    return filled


def degrade(image: Image.Image, name: str = "pixelate", *, shown_size: Size | None = None, **options: object) -> Image.Image:
    """One image through the named view; see `view` for what it raises."""
    return view(name, **options)(image, shown_size=shown_size)
