"""The views beside `pixelate`: worked examples, what each one keeps, and how a recipe or the command line chooses one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaopd.config import ViewConfig, parse_config
from vaopd.errors import ConfigError
from vaopd.views import VIEWS, black, blur, crop, degrade, grey, noise, options_of, patch_shuffle, view

RECIPE: dict[str, Any] = {"run": "r", "student": "s", "teacher": "t", "data": {"train": "train.jsonl"}}


def picture(pixels: Any) -> Image.Image:
    """An RGB image whose three channels are this array of 0..255."""
    return Image.fromarray(np.repeat(np.asarray(pixels, dtype=np.uint8)[:, :, None], 3, axis=2))


def values(image: Image.Image) -> list[list[int]]:
    """The first channel, after a check that all three are alike."""
    pixels = np.asarray(image)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0].tolist()


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- each view --------------------------------------------------------------------------------------------------------


def test_grey_is_the_mean_colour_everywhere() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (10, 0, 255))
    image.putpixel((1, 0), (20, 1, 0))  # means 15, 0.5 and 127.5
    assert [grey(image).getpixel((x, 0)) for x in (0, 1)] == [(15, 0, 128)] * 2


def test_black_keeps_the_size_alone() -> None:
    assert black(random_image(5, 3)).getcolors() == [(15, (0, 0, 0))]


def test_crop_enlarges_the_centre() -> None:
    # Half of each side of 4x4 is the middle 2x2; bilinear puts its values at the corners and 3:1 mixtures between them.
    image = picture([[9, 9, 9, 9], [9, 0, 100, 9], [9, 0, 100, 9], [9, 9, 9, 9]])
    assert values(crop(image, 0.5)) == [[0, 25, 75, 100]] * 4


def test_blur_is_a_gaussian_of_the_stated_width() -> None:
    # The variance of a blurred line across it is the kernel's: (0.1 · 80)² = 64. Pillow composes the kernel of boxes, so nearly.
    line = np.zeros((80, 160))
    line[:, 80] = 255
    row = np.asarray(blur(picture(line), 0.1), dtype=float)[40, :, 0]
    variance = (row * (np.arange(160) - 80) ** 2).sum() / row.sum()
    assert variance == pytest.approx(64, rel=0.15)


def test_patches_trade_places_and_lose_nothing() -> None:
    image = random_image(17, 9)  # patches of int(0.25 · 9) = 2 pixels: 8 x 4 of them, and an edge of one pixel that stays
    before, after = np.asarray(image), np.asarray(patch_shuffle(image, 0.25))

    def patches(pixels: np.ndarray) -> list[bytes]:
        return [pixels[y : y + 2, x : x + 2].tobytes() for y in range(0, 8, 2) for x in range(0, 16, 2)]

    assert Counter(patches(before)) == Counter(patches(after))
    assert sum(one == other for one, other in zip(patches(before), patches(after), strict=True)) < 8  # of 32
    assert (before[8] == after[8]).all()
    assert (before[:, 16] == after[:, 16]).all()


def test_one_patch_stays_as_it_is() -> None:
    assert patch_shuffle(random_image(8, 8), 1.0).tobytes() == random_image(8, 8).tobytes()


def test_noise_is_uniform_at_full_strength_and_a_mixture_below() -> None:
    dark, bright = Image.new("RGB", (100, 100)), Image.new("RGB", (100, 100), (255, 255, 255))
    drawn = np.asarray(noise(dark, 1.0), dtype=float)
    assert drawn.mean() == pytest.approx(127.5, abs=2)
    assert drawn.std() == pytest.approx(73.9, abs=1)  # sqrt((256² - 1) / 12)
    assert np.asarray(noise(bright, 0.5)).min() >= 127
    assert np.asarray(noise(dark, 0.5)).max() <= 128


@pytest.mark.parametrize("name", ["noise", "patch_shuffle"])
def test_random_views_depend_on_the_picture_alone(name: str) -> None:
    code = f"from PIL import Image; from vaopd.views import {name} as f; print(f(Image.linear_gradient('L')).tobytes().hex()[:600])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    gradient = Image.linear_gradient("L")
    assert degrade(gradient, name).tobytes().hex()[:600] == other
    assert degrade(gradient.rotate(180), name).tobytes() != degrade(gradient, name).rotate(180).tobytes()


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_palette_images_are_seen_as_their_colours(name: str) -> None:
    image = random_image(12, 12).convert("P", palette=Image.Palette.ADAPTIVE)
    assert degrade(image, name).tobytes() == degrade(image.convert("RGB"), name).tobytes()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("blur", {"radius": 0}, "radius must be above 0"),
        ("blur", {"radius": 1.5}, "at most 1"),
        ("blur", {"radius": True}, "radius must be above 0"),
        ("blur", {"radius": "x"}, "wrong type"),
        ("crop", {"share": -1}, "share must be above 0"),
        ("noise", {"strength": float("nan")}, "strength"),
        ("patch_shuffle", {"side": 0.001}, r"side must be at least 0\.01"),
        ("grey", {"ratio": 0.1}, "it has none"),
        ("patch_shuffle", {"sid": 0.1}, "Did you mean 'side'"),
    ],
)
def test_wrong_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        view(name, **options)


# --- choosing one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name", "options"),
    [
        ("grey", "grey", {}),
        ({"name": "blur", "radius": 0.2}, "blur", {"radius": 0.2}),
        ({"ratio": 0.3}, "pixelate", {"ratio": 0.3, "resolution": "original"}),
        ({"name": "crop"}, "crop", {"share": 0.5}),
    ],
)
def test_a_recipe_chooses_a_view(written: Any, name: str, options: dict[str, Any]) -> None:
    config = parse_config({**RECIPE, "view": written})
    assert (config.view.name, config.view.options) == (name, options)
    assert config.model_dump(mode="json")["view"] == {"name": name, **options}
    image = random_image(20, 30)
    assert config.view.make()(image, shown_size=None).tobytes() == degrade(image, name, **options).tobytes()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("blurr", "view: unknown view 'blurr'.*Did you mean 'blur'"),
        ({"name": "blur", "radios": 0.1}, "view 'blur' has no option 'radios'; it has: radius. Did you mean 'radius'"),
        ({"name": "blur", "ratio": 0.1}, "view 'blur' has no option 'ratio'"),
        ({"name": "crop", "share": 1}, "leaves an image as it is"),
        ({"name": ["blur"]}, "unknown view"),
        ([], "view"),
    ],
)
def test_a_wrong_view_is_a_mistake_of_the_recipe(written: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**RECIPE, "view": written})


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_the_command_line_says_the_same(name: str) -> None:
    config = ViewConfig.model_validate({"name": name})
    _, chosen, *settings = config.to_options()
    assert ViewConfig.from_options(chosen, [setting.removeprefix("--view-set=") for setting in settings]) == config
    assert config.options == options_of(name)


def test_the_command_line_refuses_alike() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'radius'"):
        ViewConfig.from_options("blur", ["radis=0.1"])
    with pytest.raises(ConfigError, match="key=value"):
        ViewConfig.from_options("blur", ["0.1"])
