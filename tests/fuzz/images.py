"""Image files that are broken in bytes, lie about their size, are very large, or of a format that nobody asked for."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz.harness import Case, Fault
from fuzz.mutate import bytes_of, flip
from PIL import Image, PngImagePlugin

from mmprune_train.config.compose import compose_config
from mmprune_train.data.images import ImageReader, image_processor

PLAIN = 12
SIDE = 48
Made = tuple[bytes, str]
"""A file's content, and what is odd about it."""
_known: dict[str, Any] = {}
HUGE = (1, 2, 0x7FFF, 0x8000, 0xFFFF, 50_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def warm(root: Path) -> None:
    """The image processors of both stages, and a small picture in every way it can be written."""
    encoder = compose_config(["+experiment=smoke"]).encoder
    _known["readers"] = [ImageReader(image_processor(encoder, ratio)) for ratio in ("square", "pad")]
    _known["seeds"] = seeds()


def plain(rng: random.Random, folder: Path, number: int) -> Case:
    """A picture as it was written."""
    name = rng.choice(sorted(_known["seeds"]))
    return _case(f"{name} as it is", _known["seeds"][name], f"a.{name.split('-')[0]}", rng, folder)


def case(rng: random.Random, folder: Path, number: int) -> Case:
    """A picture that is not as it was, or one that is odd by itself."""
    name = rng.choice(sorted(_known["seeds"]))
    data, told = _known["seeds"][name], name
    suffix = name.split("-")[0]
    kind = rng.choice(["bytes"] * 6 + ["sizes"] * 2 + ["odd"] * 2)
    if kind == "odd":
        data, told = rng.choice(ODD)(rng)
        suffix = rng.choice(["png", "jpg", "tif", "gif"])
        if rng.random() < 0.2:
            data, how = bytes_of(rng, data)
            told = f"{told}, {how}"
    elif kind == "sizes" and suffix in SIZES:
        data, how = SIZES[suffix](rng, data)
        told = f"{told}, {how}"
        if rng.random() < 0.2:
            data, how = bytes_of(rng, data)
            told = f"{told}, {how}"
    else:
        for _ in range(rng.choice([1, 1, 2])):
            data, how = bytes_of(rng, data)
            told = f"{told}, {how}"
        if suffix == "png" and rng.random() < 0.5:
            data, told = _checksums(data), f"{told}, checksums set right"
    return _case(told, data, f"a.{suffix}", rng, folder)


def _case(told: str, data: bytes, name: str, rng: random.Random, folder: Path) -> Case:
    path = folder / name
    path.write_bytes(data)
    which = rng.randrange(2)

    def run() -> str:
        pixels = _known["readers"][which](path, "the sample that asks")
        if pixels.shape != (3, SIDE, SIDE) or pixels.dtype != torch.float32 or not torch.isfinite(pixels).all():
            raise Fault(f"pixels of shape {list(pixels.shape)}, {pixels.dtype}")
        return "accepted"

    return Case(f"{('square', 'pad')[which]}: {told}, {len(data)} bytes", [str(path)], run)


def seeds() -> dict[str, bytes]:
    """Format and kind -> a picture of 24 x 20 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    noise[:, :, 3] |= 128
    rgba = Image.fromarray(noise)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = b"\0" * 128 + b"not a profile"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 100, zip=True)
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)], "duration": 10, "loop": 0}
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "png-rgb": (rgb, {"pnginfo": text}),
        "png-rgba": (rgba, {}),
        "png-grey": (grey, {}),
        "png-grey16": (deep, {}),
        "png-bit": (rgb.convert("1"), {}),
        "png-palette": (rgb.quantize(16), {"transparency": 3}),
        "png-la": (rgba.convert("LA"), {}),
        "png-animated": (rgb, frames),
        "png-exif": (rgb, {"exif": exif, "icc_profile": profile}),
        "jpg-rgb": (rgb, {"exif": exif}),
        "jpg-progressive": (rgb, {"progressive": True, "icc_profile": profile}),
        "jpg-grey": (grey, {}),
        "jpg-cmyk": (rgb.convert("CMYK"), {}),
        "webp-lossy": (rgb, {"exif": exif}),
        "webp-lossless": (rgba, {"lossless": True}),
        "webp-animated": (rgb, frames),
        "gif-palette": (rgb, {}),
        "gif-animated": (rgb, frames),
        "tif-rgb": (rgb, {}),
        "tif-lzw": (rgb, {"compression": "tiff_lzw"}),
        "tif-jpeg": (rgb, {"compression": "jpeg"}),
        "tif-zip": (rgba, {"compression": "tiff_adobe_deflate"}),
        "tif-fax": (rgb.convert("1"), {"compression": "group4"}),
        "tif-grey16": (deep, {}),
        "tif-float": (grey.convert("F"), {}),
        "tif-int": (grey.convert("I"), {}),
        "tif-pages": (rgb, {"save_all": True, "append_images": [grey]}),
        "bmp-rgb": (rgb, {}),
        "bmp-palette": (rgb.quantize(16), {}),
        "ppm-rgb": (rgb, {}),
        "ppm-grey": (grey, {}),
        "ppm-bit": (rgb.convert("1"), {}),
        "ppm-grey16": (deep.convert("I"), {}),
    }
    formats = {"jpg": "jpeg", "tif": "tiff"}
    found = {}
    for name, (image, how) in made.items():
        kind = name.split("-")[0]
        image.copy().save(file := io.BytesIO(), formats.get(kind, kind), **how)  # a JPEG leaves settings in an image
        found[name] = file.getvalue()
    found["png-interlaced"] = png(24, 20, 2, 8, noise[:, :, :3].tobytes(), interlaced=True)
    found["png-rgb16"] = png(24, 20, 2, 16, (noise[:, :, :3].astype(">u2") * 257).tobytes())
    found["ppm-plain"] = b"P3\n# a comment\n2 2\n255\n" + b"1 2 3 " * 4
    found["ppm-float"] = b"Pf\n2 2\n-1.0\n" + struct.pack("<4f", 0, 0.5, 1, 2)
    return found


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of PNG's colour types."""


def png(width: int, height: int, colour: int, bits: int, raw: bytes, interlaced: bool = False) -> bytes:
    """A PNG of these samples, row by row."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    size = -(-CHANNELS[colour] * bits // 8)
    rows = []
    steps = ADAM7 if interlaced else ((0, 0, 1, 1),)
    for left, top, across, down in steps:
        for y in range(top, height, down):
            row = raw[y * width * size : (y + 1) * width * size]
            pixels = [row[x * size : (x + 1) * size] for x in range(left, width, across)]
            rows.append(b"\0" + b"".join(pixels) if pixels else b"")
    body = zlib.compress(b"".join(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps to the next, of each pass of an interlaced PNG."""


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _checksums(data: bytes) -> bytes:
    """A PNG with right checksums, so that what is wrong reaches the decoder."""
    made, at = data[:8], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            break
        made += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + size])
        at += 12 + size
    return made + data[at:]


def _flat(width: int, height: int, bits: int = 1) -> bytes:
    """A true PNG of one colour, of a few kilobytes at most a thousandth of its pixels."""
    squeeze, body = zlib.compressobj(9), []
    row = b"\0" + bytes(-(-width * bits // 8))
    for _ in range(height):
        body.append(squeeze.compress(row))
    body.append(squeeze.flush())
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"".join(body)) + chunk(b"IEND", b"")


STRIPS = ((1, 4000), (1, 30_000), (2, 16_000), (3, 50_000), (1, 16_383), (1, 65_535), (40, 60_000), (1, 300_000))


def _strip(rng: random.Random) -> Made:
    short, long = rng.choice(STRIPS)
    width, height = (short, long) if rng.random() < 0.5 else (long, short)
    if max(width, height) <= 60_000 and rng.random() < 0.4:
        kind = rng.choice(["bmp", "tiff", "ppm"] if max(width, height) > 16_000 else ["jpeg", "webp", "bmp", "tiff"])
        Image.new("RGB", (width, height), "teal").save(file := io.BytesIO(), kind)
        return file.getvalue(), f"a {kind} strip of {width} x {height}"
    return _flat(width, height), f"a strip of {width} x {height}"


def _bomb(rng: random.Random) -> Made:
    side = rng.choice([4000, 9000, 13_000, 16_000, 20_000, 30_000])
    bits = rng.choice([1, 1, 8]) if side < 20_000 else 1
    return _flat(side, side, bits), f"one colour, {side} x {side}, {bits} bits"


def _grey_bomb(rng: random.Random) -> Made:
    side = rng.choice([6000, 10_000, 13_000])
    return _flat(side, side // 2, 16), f"one grey of 16 bits, {side} x {side // 2}"


def _frames(rng: random.Random) -> Made:
    count = rng.choice([200, 2000])
    Image.new("P", (64, 64)).save(file := io.BytesIO(), "gif")
    one = file.getvalue()
    start = one.index(b",")
    return one[:start] + one[start:-1] * count + b";", f"a gif of {count} frames"


def _text_bomb(rng: random.Random) -> Made:
    text = b"comment\0\0" + zlib.compress(bytes(rng.choice([2, 100]) << 20), 9)
    base = _known["seeds"]["png-rgb"]
    return base[:33] + chunk(b"zTXt", text) * rng.choice([1, 40]) + base[33:], "a PNG with text that unpacks to much"


def _profile_bomb(rng: random.Random) -> Made:
    profile = b"icc\0\0" + zlib.compress(bytes(rng.choice([10, 300]) << 20), 9)
    base = _known["seeds"]["png-rgb"]
    return base[:33] + chunk(b"iCCP", profile) + base[33:], "a PNG with a profile that unpacks to much"


FOREIGN = "EPS PDF ICO ICNS TGA PCX SGI IM MSP SPIDER XBM JPEG2000 DDS AVIF QOI DIB"


def _foreign(rng: random.Random) -> Made:
    """Of a format that Pillow opens, and that is not one of those that are read."""
    name = rng.choice(FOREIGN.split())
    image = Image.new("1" if name in ("MSP", "XBM") else "RGB", (32, 32))
    try:
        image.save(file := io.BytesIO(), name)
    except (KeyError, OSError, ValueError):  # this Pillow does not write it
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print\n", "a bare EPS"
    return file.getvalue(), f"a picture in {name}"


SCRIPTS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{ } loop\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100000 100000\n%%EndComments\nshowpage\n",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'><image href='file:///etc/passwd'/></svg>",
    b"P6\n# " + b"x" * 100_000,
    b"P6 " + b"9" * 100_000,
    b"P3\n50000 50000\n255\n1 2 3",
    b"P6\n4000 4000\n65535\n",
    b"P7\nWIDTH 30000\nHEIGHT 30000\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n",
    b"P4\n-5 10\n",
    b"P5\n10 10\n0\n" + bytes(100),
    b"PF\n10 10\nnan\n" + bytes(1200),
    b"GIF89a" + b"\xff" * 7 + b"," + bytes(50),
    b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 30,
    b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f\0\0\0\0\0\0\0\0",
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0x7FFFFFFF, -0x7FFFFFFF, 1, 24, 0, 0, 0, 0, 0, 0),
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 30_000, 30_000, 1, 8, 1, 0, 0, 0, 0, 0) + b"\0\1\0\1",
    b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\3\0\1\0\0\0\xff\xff\0\0" * 100,
    b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    b"\xff\xd8\xff",
    b"\xff\xd8" + b"\xff\xfe\xff\xff" + b"x" * 65_533,
    b"\x89PNG\r\n\x1a\n",
    b"",
    b"<html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
)  # fmt: skip


def _script(rng: random.Random) -> Made:
    data = rng.choice(SCRIPTS)
    return data, f"{data[:60]!r}"


def _zip(rng: random.Random) -> Made:
    """A TIFF of 16 bits or of floats that are no brightness."""
    values = np.array([[np.nan, np.inf, -np.inf, 1e38], [0, -1, 65_535, 1e-38]], dtype=np.float32)
    image = Image.fromarray(values if rng.random() < 0.5 else (values[1:].astype(np.int32) << 15))
    image.save(file := io.BytesIO(), "tiff")
    return file.getvalue(), f"a TIFF of odd values in mode {image.mode}"


ODD: tuple[Callable[[random.Random], Made], ...] = (
    _strip, _strip, _strip, _bomb, _grey_bomb, _frames, _text_bomb, _profile_bomb, _foreign, _foreign, _script,
    _script, _script, _zip,
)  # fmt: skip


def _png_size(rng: random.Random, data: bytes) -> Made:
    width, height = rng.choice(HUGE), rng.choice([*HUGE, 20])
    if rng.random() < 0.5:
        width, height = height, width
    return _checksums(data[:16] + struct.pack(">II", width, height) + data[24:]), f"says {width} x {height}"


def _jpeg_size(rng: random.Random, data: bytes) -> Made:
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    height, width = (rng.choice([1, 20, 0, 0x7FFF, 0xFFFF]) for _ in range(2))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :], f"says {width} x {height}"


def _gif_size(rng: random.Random, data: bytes) -> Made:
    width, height = (rng.choice([0, 1, 24, 0x7FFF, 0xFFFF]) for _ in range(2))
    size = struct.pack("<HH", width, height)
    data = data[:6] + size + data[10:]
    if rng.random() < 0.7:
        at = data.index(b",", 13)
        data = data[: at + 5] + size + data[at + 9 :]
    return data, f"says {width} x {height}"


def _bmp_size(rng: random.Random, data: bytes) -> Made:
    width, height = (rng.choice([0, 1, -1, 24, 50_000, 0x7FFFFFFF, -0x80000000]) for _ in range(2))
    return data[:18] + struct.pack("<ii", width, height) + data[26:], f"says {width} x {height}"


def _webp_size(rng: random.Random, data: bytes) -> Made:
    at = data.find(b"VP8X")
    if at < 0:
        return flip(rng, data, 12, 40)
    return data[: at + 12] + rng.randbytes(6) + data[at + 18 :], "canvas of any size"


def _ppm_size(rng: random.Random, data: bytes) -> Made:
    width, height = rng.choice([*HUGE, 10**30]), rng.choice([*HUGE, 0])
    return data[:3] + f"{width} {height}\n".encode() + data[data.index(b"\n", 3) + 1 :], f"says {width} x {height}"


def _tiff_tag(rng: random.Random, data: bytes) -> Made:
    """Another value in one of the tags: sizes, bits, offsets, counts."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack(f"{order}I", data[4:8])[0]
    count = struct.unpack(f"{order}H", data[start : start + 2])[0]
    at = start + 2 + 12 * rng.randrange(count)
    tag, value = struct.unpack(f"{order}H", data[at : at + 2])[0], rng.choice([0, *HUGE])
    field = 8 if rng.random() < 0.8 else 4
    return data[: at + field] + struct.pack(f"{order}I", value) + data[at + field + 4 :], f"tag {tag} has {value}"


SIZES = {
    "png": _png_size, "jpg": _jpeg_size, "gif": _gif_size, "bmp": _bmp_size, "webp": _webp_size, "ppm": _ppm_size,
    "tif": _tiff_tag,
}  # fmt: skip
