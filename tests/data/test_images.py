"""The decoder: one picture in many encodings gives one hash; what isn't a whole picture is refused with reason and fix."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_processor import encoded, noise

from vaopd.data.images import MAX_PIXELS, STRIP, content_hash, decode, png_bytes
from vaopd.errors import DataError

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)  # wider than high: a rotation shows


def grey_picture() -> Image.Image:
    return Image.fromarray(GREY)


def png16(values: np.ndarray) -> bytes:
    """A 16-bit grey PNG, written by hand."""
    height, width = values.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return _png(struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0), raw)


def _png(header: bytes, raw: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG whose header promises more pixels than its few bytes hold."""
    return _png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"\0" * 1000)


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    if kind == b"VP8X":
        body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + b"\0" * 8
    else:
        body = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk + b"\0" * 16


# --- equal pixels ----------------------------------------------------------------------------------------------------


def test_encodings_of_one_picture_have_one_hash() -> None:
    picture = grey_picture()
    rgb = picture.convert("RGB")
    opaque = rgb.convert("RGBA")
    encodings = {
        "png rgb": encoded(rgb),
        "png grey": encoded(picture),
        "png palette": encoded(picture.convert("P")),
        "png rgba": encoded(opaque),
        "png grey alpha": encoded(picture.convert("LA")),
        "png 16 bit": png16(GREY.astype(np.uint16) * 257),
        "webp lossless": encoded(rgb, "WEBP", lossless=True),
        "webp lossless alpha": encoded(opaque, "WEBP", lossless=True, exact=True),
    }
    hashes = {name: content_hash(decode(data)) for name, data in encodings.items()}
    assert set(hashes.values()) == {content_hash(rgb)}, hashes


def test_one_bit() -> None:
    bits = Image.fromarray((GREY > 100).astype(np.uint8) * 255)
    assert content_hash(decode(encoded(bits.convert("1")))) == content_hash(bits.convert("RGB"))


def test_16_bit_keeps_the_high_byte() -> None:
    values = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)
    assert np.asarray(decode(png16(values)))[0, :, 0].tolist() == [0, 0, 1, 156, 255]  # clipping would give 255 from 255 on


def test_16_bit_with_a_transparent_grey() -> None:
    values = np.array([[1000, 40_000]], dtype=np.uint16)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    data = _png(header, b"\0" + values.astype(">u2").tobytes(), (b"tRNS", struct.pack(">H", 1000)))
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 156]


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = np.asarray(decode(encoded(red, "JPEG", quality=100)))[8, 8].astype(int)
    assert pixel[0] > 250
    assert max(pixel[1:]) < 5


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L", "RGB"])
def test_transparency_lies_on_white(mode: str) -> None:
    """The left half is transparent black, the right one opaque black."""
    black = Image.new("L", (4, 2), 0)
    alpha = Image.fromarray(np.array([[0, 0, 255, 255]] * 2, dtype=np.uint8))
    if mode in ("RGBA", "LA"):
        image = black.convert(mode)
        image.putalpha(alpha)
        data = encoded(image)
    else:  # one colour is declared transparent: index or value 7
        values = np.array([[7, 7, 0, 0]] * 2, dtype=np.uint8)
        image = Image.fromarray(values)
        if mode == "P":
            image.putpalette([0, 0, 0] * 256)
        image = image.convert(mode)
        data = encoded(image, transparency=(7, 7, 7) if mode == "RGB" else 7)
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 255, 0, 0]


def test_half_transparency_is_mixed() -> None:
    assert np.asarray(decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 127)))))[0, 0].tolist() == [128, 128, 128]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_upright_picture(kind: str, orientation: int) -> None:
    upright = Image.fromarray(np.kron(np.array([[0, 80, 160], [240, 40, 120]], dtype=np.uint8), np.ones((16, 16), np.uint8))).convert("RGB")
    turn_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what a camera stored, from the upright picture (Image.Transpose)
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turn_back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    image = decode(encoded(stored, kind, exif=exif, **options))
    assert image.size == upright.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).max() <= 2


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(noise()))
    assert content_hash(decode(path)) == content_hash(noise())


def test_hash_separates_shape_and_pixels() -> None:
    assert content_hash(Image.new("RGB", (2, 3))) != content_hash(Image.new("RGB", (3, 2)))
    assert content_hash(noise(seed=0)) != content_hash(noise(seed=1))


def test_hash_is_of_every_pixel_of_a_picture_of_many_strips() -> None:
    """Those of the last, shorter strip and of one that is wider than a strip too."""
    for image in (noise(300, 500), noise(STRIP + 1, 2)):
        whole = hashlib.sha256(f"RGB {image.width} {image.height}\n".encode() + image.tobytes())
        assert content_hash(image) == whole.hexdigest()


def test_png_bytes_round_trip() -> None:
    assert content_hash(decode(png_bytes(noise(7, 5)))) == content_hash(noise(7, 5))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (3, 3)])
def test_extreme_sizes_decode(size: tuple[int, int]) -> None:
    assert decode(encoded(noise(*size))).size == size


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(kind: str, share: float) -> None:
    data = encoded(noise(), kind)
    with pytest.raises(DataError, match=r"Export or download it again|Convert it"):
        decode(data[: int(len(data) * share)])


def test_flipped_bytes_never_give_a_traceback() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = np.frombuffer(encoded(noise(16, 16), kind), dtype=np.uint8)
        for _ in range(150):
            hurt = data.copy()
            hurt[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(DataError):
                assert decode(hurt.tobytes()).mode == "RGB"


REFUSED = [
    (b"", "empty"),
    (b"hello", "no JPEG, PNG or WebP"),
    (encoded(noise(), "GIF"), "a GIF"),
    (encoded(noise(), "BMP"), "a BMP"),
    (encoded(noise(), "TIFF"), "a TIFF"),
    (b"<html>404</html>", "HTML"),
    (bomb(), "pixels; at most"),
    (bomb(8000, 8000), "64,000,000 pixels"),
    (webp_header(16_000, 16_000, b"VP8X"), "256,000,000 pixels"),
    (webp_header(16_000, 16_000, b"VP8L"), "256,000,000 pixels"),
    (webp_header(16_000, 16_000, b"VP8 "), "256,000,000 pixels"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_with_reason(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation(kind: str) -> None:
    with pytest.raises(DataError, match="animation of 2 frames"):
        decode(encoded(noise(), kind, save_all=True, append_images=[noise(seed=1)]))


def test_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png' does not exist"):
        decode(tmp_path / "gone.png")
    with pytest.raises(DataError, match="no ordinary file"):
        decode(tmp_path)


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="no ordinary file"):
        decode(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="no ordinary file"):
        decode(Path("/dev/zero"))


def test_limit_is_an_argument() -> None:
    assert MAX_PIXELS >= 24_000_000
    with pytest.raises(DataError, match="at most 4,095"):
        decode(encoded(noise()), max_pixels=4095)


def test_bombs_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    """In a process of its own: each bomb is refused, and the peak of memory stays far below one decoded picture."""
    (tmp_path / "a.png").write_bytes(bomb())
    (tmp_path / "b.webp").write_bytes(webp_header(16_383, 16_383, b"VP8X"))
    text = _png(struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), b"\0\0\0\0", (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 300_000_000)))
    (tmp_path / "c.png").write_bytes(text)
    with (tmp_path / "d.png").open("wb") as file:
        file.truncate(20_000_000_000)  # sparse: no space on disk
    code = """
import sys, time
from pathlib import Path
from vaopd.data.images import decode
from vaopd.errors import DataError
from vaopd.train.health import process_status
before, start = process_status("VmHWM"), time.monotonic()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode(path)
        raise SystemExit(f"{path} was decoded")
    except DataError:
        pass
print(process_status("VmHWM") - before, time.monotonic() - start)
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr + result.stdout
    mebibytes, seconds = map(float, result.stdout.split())
    assert mebibytes < 250
    assert seconds < 2
