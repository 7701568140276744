"""Views: an image with less detail, the same size (the paper's degraded image ṽ).

A view is one function `(image, *, shown_size, **options) -> image` and one line in `VIEWS`; a recipe names it. The result has the
size of the input, so both views give the processor the same grid and the prompt the same ids.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import random
from collections.abc import Callable
from typing import Any, Protocol

from PIL import Image, ImageFilter, ImageStat

from vaopd.errors import ConfigError, did_you_mean

Size = tuple[int, int]  # (width, height) in pixels

RESOLUTIONS = ("original", "shown", "lowest")
FINEST_PATCH = 0.01  # of the shorter side: 10,000 patches of a square image


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


def blur(image: Image.Image, radius: float = 0.1, *, shown_size: Size | None = None) -> Image.Image:
    """Gaussian blur; `radius` is its standard deviation relative to the shorter side, so large and small images lose alike.

    Raises `ConfigError` for a radius outside (0, 1].
    """
    _require_share("blur", "radius", radius)
    return image.convert("RGB").filter(ImageFilter.GaussianBlur(radius * min(image.size)))


def grey(image: Image.Image, *, shown_size: Size | None = None) -> Image.Image:
    """One colour everywhere, the image's own mean: brightness and tint stay, every shape is gone."""
    rgb = image.convert("RGB")
    red, green, blue = (round(mean) for mean in ImageStat.Stat(rgb).mean)
    return Image.new("RGB", rgb.size, (red, green, blue))


def black(image: Image.Image, *, shown_size: Size | None = None) -> Image.Image:
    """Black everywhere: nothing of the image stays but its size."""
    return Image.new("RGB", image.size)


def noise(image: Image.Image, strength: float = 0.8, *, shown_size: Size | None = None) -> Image.Image:
    """`(1 - strength) · image + strength · noise`, the noise uniform over 0..255 in each pixel and channel, seeded by the image's pixels.

    Raises `ConfigError` for a strength outside (0, 1]; at 1 nothing of the image stays.
    """
    _require_share("noise", "strength", strength)
    rgb = image.convert("RGB")
    drawn = _generator(rgb).randbytes(3 * rgb.width * rgb.height)
    return Image.blend(rgb, Image.frombytes("RGB", rgb.size, drawn), strength)


def patch_shuffle(image: Image.Image, side: float = 0.125, *, shown_size: Size | None = None) -> Image.Image:
    """Square patches trade places, in an order seeded by the image's pixels: details stay readable, their arrangement is lost.

    `side` is a patch's side relative to the image's shorter one, at least one pixel. What is left over at the right and the lower edge
    stays where it is. Raises `ConfigError` for a side outside [0.01, 1].
    """
    _require_share("patch_shuffle", "side", side, least=FINEST_PATCH)
    rgb = image.convert("RGB")
    step = max(1, int(side * min(rgb.size)))
    places = [(x, y) for y in range(0, rgb.height - step + 1, step) for x in range(0, rgb.width - step + 1, step)]
    order = list(places)
    _generator(rgb).shuffle(order)
    out = rgb.copy()
    for (x, y), place in zip(order, places, strict=True):
        out.paste(rgb.crop((x, y, x + step, y + step)), place)
    return out


def crop(image: Image.Image, share: float = 0.5, *, shown_size: Size | None = None) -> Image.Image:
    """The centre, `share` of each side, enlarged back to the whole size (bilinear): what lies around it is lost.

    Raises `ConfigError` for a share outside (0, 1].
    """
    _require_share("crop", "share", share)
    rgb = image.convert("RGB")
    width, height = (max(1, int(share * side)) for side in rgb.size)
    left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
    # Cropped first: a resize of a box also mixes in the pixels around it.
    return rgb.crop((left, top, left + width, top + height)).resize(rgb.size, Image.Resampling.BILINEAR)


def _require_share(view_name: str, option: str, value: float, *, least: float = 0.0) -> None:
    if isinstance(value, bool) or not (0 < value <= 1 and value >= least):
        low = f"at least {least}" if least else "above 0"
        raise ConfigError(f"{view_name}: {option} must be {low} and at most 1, got {value}.")


def _generator(rgb: Image.Image) -> random.Random:
    """Seeded by size and pixels: a picture gets the same view in every run and process, and two pictures get different ones."""
    content = f"{rgb.width} {rgb.height}\n".encode() + rgb.tobytes()
    return random.Random(int.from_bytes(hashlib.sha256(content).digest(), "big"))


VIEWS: dict[str, Callable[..., Image.Image]] = {
    "pixelate": pixelate,
    "blur": blur,
    "patch_shuffle": patch_shuffle,
    "crop": crop,
    "noise": noise,
    "grey": grey,
    "black": black,
}


def options_of(name: str, **given: object) -> dict[str, Any]:
    """All options of the named view: its defaults, replaced by the given ones.

    Raises `ConfigError` for an unknown name or an unknown option.
    """
    if not isinstance(name, str) or name not in VIEWS:
        raise ConfigError(f"unknown view {name!r}; known: {', '.join(VIEWS)}.{did_you_mean(str(name), VIEWS)}")
    parameters = inspect.signature(VIEWS[name]).parameters.values()
    known = {option.name: option.default for option in parameters if option.name not in ("image", "shown_size")}
    for option in given:
        if option not in known:
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"view {name!r} has no option {option!r}; {has}.{did_you_mean(option, known)}")
    return known | given


def view(name: str = "pixelate", **options: object) -> View:
    """The named view with its options filled in, checked at once.

    Raises `ConfigError` for an unknown name, an unknown option, or a value that the view refuses.
    """
    filled_options = options_of(name, **options)
    filled: View = functools.partial(VIEWS[name], **filled_options)
    try:
        filled(Image.new("RGB", (2, 2)), shown_size=(2, 2))
    except TypeError as error:
        raise ConfigError(f"view {name!r}: an option has the wrong type: {error}") from error
    return filled


def degrade(image: Image.Image, name: str = "pixelate", *, shown_size: Size | None = None, **options: object) -> Image.Image:
    """One image through the named view; see `view` for what it raises."""
    return view(name, **options)(image, shown_size=shown_size)
