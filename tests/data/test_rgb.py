"""Pixels of any kind are RGB as a viewer shows them."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from data.pictures import chunk, pixels, png
from PIL import Image

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.images import read_image
from mmprune_train.errors import UserError

SIDE = 32
RAMP = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))
GREY = np.round(RAMP * 255).astype(np.uint8)
WORDS = np.round(RAMP * 65535).astype(np.uint16)
ENCODER = EncoderConfig(name="t", image_size=16, patch_size=8)


# -- more than 8 bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "array"),
    [
        (".png", WORDS),
        (".tif", WORDS),
        (".tif", WORDS.astype(">u2")),
        (".pgm", WORDS),
        (".jp2", WORDS),
        (".tif", WORDS.astype(np.int32)),
        (".tif", GREY.astype(np.int32)),
        (".tif", WORDS.astype(np.int32) - 32768),
        (".tif", WORDS.astype(np.int32) * 1000),
        (".tif", RAMP.astype(np.float32)),
        (".tif", RAMP.astype(np.float32) * 255),
        (".tif", RAMP.astype(np.float32) * 65535),
        (".tif", RAMP.astype(np.float32) * 2 - 1),
        (".tif", RAMP.astype(np.float32) * 8 + 0.5),  # depth in metres
        (".tif", RAMP.astype(np.float32) * 1e30),
        (".pfm", RAMP.astype(np.float32)),
    ],
)
def test_more_than_8_bits_look_like_8(ending: str, array: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(array).save(tmp_path / f"x{ending}")
    assert np.abs(pixels(tmp_path / f"x{ending}") - GREY[..., None]).max() <= 1


def test_a_dark_image_of_16_bits_stays_dark(tmp_path: Path) -> None:
    for name, array in {"x.png": WORDS // 8, "x.pgm": WORDS // 8, "dark.tif": RAMP.astype(np.float32) / 8}.items():
        Image.fromarray(array).save(tmp_path / name)
        assert np.abs(pixels(tmp_path / name) - GREY[..., None] / 8).max() <= 1


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_pngs_of_16_bits_a_channel(colour: int, channels: int, tmp_path: Path) -> None:
    array = np.repeat(WORDS[..., None], channels, 2)
    alpha = 32768 if channels in (2, 4) else 65535
    if channels in (2, 4):
        array[..., -1] = alpha
    seen = pixels(png(tmp_path / "x.png", array.squeeze(), colour))
    expected = 255 - (255 - GREY.astype(float)) * alpha / 65535
    assert np.abs(seen - expected[..., None]).max() <= 2


def test_tiffs_of_12_bits_and_of_white_as_zero(tmp_path: Path) -> None:
    def tiff(bits: int, photometric: int, data: bytes) -> np.ndarray:
        tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: SIDE, 279: len(data)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        offset = struct.pack("<I", 8 + len(data))
        (tmp_path / "x.tif").write_bytes(b"II*\0" + offset + data + struct.pack("<H", len(tags)) + entries + bytes(4))
        return pixels(tmp_path / "x.tif")

    twelve = np.round(RAMP * 4095).astype(int)
    first, second = twelve[:, ::2], twelve[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 2).astype(np.uint8)
    assert np.abs(tiff(12, 1, packed.tobytes()) - GREY[..., None]).max() <= 1
    assert np.abs(tiff(16, 0, (65535 - WORDS).astype("<u2").tobytes()) - GREY[..., None]).max() <= 1


@pytest.mark.parametrize(("value", "grey"), [(0.0, 0), (0.5, 128), (1.0, 255), (7.0, 0), (128.0, 128), (-3.0, 0)])
def test_a_float_image_of_one_value(value: float, grey: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "x.tif")
    assert (pixels(tmp_path / "x.tif") == grey).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    array = RAMP.astype(np.float32)
    array[3, 3] = value
    Image.fromarray(array).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"a\.json\[0\]: image .*x\.tif cannot be read \(.*NaN or infinite"):
        read_image(tmp_path / "x.tif", "a.json[0]")


# -- transparency and colour -----------------------------------------------------------------------------------------


def red_and_nothing(mode: str) -> Image.Image:
    """Left half opaque red (grey in grey modes), right half transparent, with black under it."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 4, 8))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "RGBA.webp", "RGBA.tif", "P.gif", "P.png", "RGBA.avif", "PA"])
def test_what_is_transparent_is_white(kind: str, tmp_path: Path) -> None:
    mode, _, ending = kind.partition(".")
    path = tmp_path / f"x.{ending or 'png'}"
    if kind == "P.png":  # transparency of every palette entry, in bytes
        image = Image.new("P", (8, 8), 1)
        image.putpalette([200, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 4, 8))
        image.save(path, transparency=bytes([255, 0]))
    elif kind == "P.gif":
        red_and_nothing("RGBA").save(path)
    elif kind == "PA":
        red_and_nothing("RGBA").quantize(4).convert("PA").convert("LA").save(path)
    else:
        red_and_nothing(mode).save(path, **({"lossless": True} if ending == "webp" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = pixels(path)
    assert (seen[:, 5:] > 250).all() and seen[:, :3, 1].max() < 80


@pytest.mark.parametrize(
    ("array", "colour", "clear"),
    [
        (np.array([[7, 0, 200]], np.uint8), 0, struct.pack(">H", 0)),
        (np.array([[7 << 8, 0, 200 << 8]], np.uint16), 0, struct.pack(">H", 0)),
        (np.repeat(np.array([[7, 100, 200]], np.uint8)[..., None], 3, 2), 2, struct.pack(">HHH", 100, 100, 100)),
        (np.repeat(np.array([[7, 100, 200]], np.uint16)[..., None] << 8, 3, 2), 2, struct.pack(">HHH", *[25600] * 3)),
    ],
)
def test_a_transparent_colour_is_white(array: np.ndarray, colour: int, clear: bytes, tmp_path: Path) -> None:
    seen = pixels(png(tmp_path / "x.png", array, colour, chunk(b"tRNS", clear)))[0, :, 0]
    assert abs(seen[0] - 7) <= 1 and seen[1] == 255 and abs(seen[2] - 200) <= 1


def test_a_transparent_colour_of_one_bit_is_white(tmp_path: Path) -> None:
    image = Image.new("1", (8, 8), 1)
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "x.png", transparency=0)
    assert (pixels(tmp_path / "x.png") == 255).all()
    image.save(tmp_path / "y.png")
    assert (pixels(tmp_path / "y.png")[:, :4] == 0).all() and (pixels(tmp_path / "y.png")[:, 4:] == 255).all()


@pytest.mark.parametrize("kind", ["CMYK.jpg", "YCbCr.jpg", "L.jpg", "RGB.jpg", "P.png", "LAB.tif", "CMYK.tif"])
def test_other_colours_become_rgb(kind: str, tmp_path: Path) -> None:
    colour = (90, 90, 90) if kind.startswith("L.") else (200, 30, 60)
    image = Image.new("RGB", (16, 16), colour)
    image = image.quantize(2) if kind.startswith("P") else image.convert(kind.split(".")[0])
    image.save(tmp_path / kind, **({"quality": 98} if kind.endswith("jpg") else {}))
    assert np.abs(pixels(tmp_path / kind) - colour).max() <= 4
