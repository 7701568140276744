"""Views: numbers worked out by hand, sizes, resolutions, and mistakes that a recipe can make."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vaopd.errors import ConfigError
from vaopd.views import VIEWS, degrade, pixelate, view


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def blocks(image: Image.Image) -> tuple[int, int]:
    """How many columns and rows of equal pixels an image of random blocks has."""
    pixels = np.asarray(image).astype(int)
    changes = [int(np.any(np.diff(pixels, axis=axis) != 0, axis=(1 - axis, 2)).sum()) for axis in (1, 0)]
    return changes[0] + 1, changes[1] + 1


def test_worked_example() -> None:
    # Halving [0, 70, 140, 210]: bilinear weighs the three pixels in reach by 3, 3, 1 of 7, so (0·3 + 70·3 + 140)/7 = 50 and 160.
    row = np.array([0, 70, 140, 210], dtype=np.uint8)
    image = Image.fromarray(np.repeat(np.tile(row, (4, 1))[:, :, None], 3, axis=2))
    assert np.asarray(pixelate(image, 0.5))[:, :, 0].tolist() == [[50, 50, 160, 160]] * 4


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((64, 64), 0.1, (6, 6)),  # int(6.4)
        ((100, 50), 0.1, (10, 5)),
        ((99, 19), 0.1, (9, 1)),  # cut, not rounded
        ((9, 9), 0.1, (1, 1)),  # at least one pixel
        ((1, 1), 0.1, (1, 1)),
        ((600, 3), 0.1, (60, 1)),
        ((64, 64), 1.0, (64, 64)),
    ],
)
def test_detail_that_is_left(size: tuple[int, int], ratio: float, expected: tuple[int, int]) -> None:
    result = pixelate(noise(*size), ratio)
    assert (result.size, result.mode) == (size, "RGB")
    assert blocks(result) == expected


def test_ratio_one_changes_nothing() -> None:
    assert np.array_equal(np.asarray(pixelate(noise(17, 5), 1.0)), np.asarray(noise(17, 5)))


@pytest.mark.parametrize("mode", ["P", "1", "L", "CMYK"])
def test_every_mode_equals_its_rgb_version(mode: str) -> None:
    image = noise(40, 30).convert(mode)
    assert np.array_equal(np.asarray(pixelate(image)), np.asarray(pixelate(image.convert("RGB"))))


def test_palette_is_averaged_not_picked() -> None:
    image = Image.fromarray(np.tile(np.array([[0, 1]], dtype=np.uint8), (10, 5))).convert("P")
    image.putpalette([0, 0, 0, 200, 200, 200])
    assert abs(int(np.asarray(pixelate(image, 0.1))[0, 0, 0]) - 100) <= 1  # nearest would give 0 or 200


@pytest.mark.parametrize(
    ("resolution", "shown", "expected"),
    [
        ("original", (200, 20), (10, 10)),
        ("shown", (200, 20), (20, 2)),
        ("lowest", (200, 20), (10, 2)),
        ("shown", (5000, 5000), (100, 100)),  # never more than the image has
        ("original", None, (10, 10)),
    ],
)
def test_resolution(resolution: str, shown: tuple[int, int] | None, expected: tuple[int, int]) -> None:
    assert blocks(pixelate(noise(100, 100), 0.1, resolution=resolution, shown_size=shown)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": 1.5}, "above 0"),
        ({"ratio": float("nan")}, "above 0"),
        ({"ratio": "a"}, "wrong type"),
        ({"ratoi": 0.1}, "Did you mean 'ratio'"),
        ({"shown_size": (1, 1)}, "no option"),
        ({"resolution": "show"}, "Did you mean 'shown'"),
    ],
)
def test_wrong_options_fail_before_any_image(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        view("pixelate", **options)


def test_unknown_view_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pixelate'"):
        view("pixellate")


def test_shown_size_unknown() -> None:
    with pytest.raises(ConfigError, match="use 'original'"):
        pixelate(noise(8, 8), resolution="shown")


@pytest.mark.parametrize("name", sorted(VIEWS))
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 64)])
def test_every_view_keeps_size_and_mode(name: str, size: tuple[int, int]) -> None:
    image = noise(*size)
    result = degrade(image, name, shown_size=(64, 64))
    assert (result.size, result.mode) == (size, "RGB")
    assert np.array_equal(np.asarray(image), np.asarray(noise(*size)))  # the input isn't changed in place
    assert result.tobytes() == degrade(image, name, shown_size=(64, 64)).tobytes()
