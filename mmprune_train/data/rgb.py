"""Any mode of Pillow as RGB, in bands of rows, so that no copy of a large picture in wider numbers is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from PIL import Image

BAND = 1 << 20
"""Pixels that are converted at a time."""
WHITE_IS_ZERO, PHOTOMETRIC, BITS = 0, 262, 258
"""A value of TIFF's tag PhotometricInterpretation, that tag, and BitsPerSample."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB: more than 8 bits scaled down to 8, what is transparent on white. An image that is RGB
    is returned as it is.

    Raises:
        ValueError: values that are no numbers; a mode that Pillow cannot convert.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _by_bands(image, _grey_scale(image))
    if image.has_transparency_data:
        return _by_bands(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def bands(image: Image.Image, pixels: int) -> Iterator[tuple[int, Image.Image]]:
    """An image in bands of about so many pixels, each with its first row."""
    rows = max(1, pixels // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    whole = Image.new("RGB", image.size)
    for top, band in bands(image, BAND):
        whole.paste(convert(band), (0, top))
    return whole


def _on_white(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, unlike what Pillow reads
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    rgba = (image.convert("L") if image.mode == "1" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_scale(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes bands of one channel of 16 or 32 bits, or of floats, grey."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):  # a format of 16 bits says itself what is white
        black, white = 0.0, float((1 << tags.get(BITS, (16,))[0]) - 1)
    elif image.mode == "I" and image.format == "PPM":
        black, white = 0.0, 65535.0
    else:
        black, white = _range(image)
    return partial(_grey, black=black, white=white, inverted=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)


def _range(image: Image.Image) -> tuple[float, float]:
    """The values that are black and white.

    Numbers without a unit: those of 0..1 (floats), of 8 and of 16 bits are told by the largest, unless it is so small
    that the picture would be all but black; else the image's own smallest and largest values.
    """
    ends = [(values.min(), values.max()) for values in (np.asarray(band) for _, band in bands(image, BAND))]
    low, high = float(np.min(ends)), float(np.max(ends))  # NaN where there is one
    if not np.isfinite((low, high)).all():
        raise ValueError("it has values that are NaN or infinite")
    if low < 0:
        return low, high
    smallest = 1.0 if image.mode == "F" else 255.0
    if high <= smallest:
        return 0.0, smallest
    return next(((0.0, white) for white in (255.0, 65535.0) if white / 4 <= high <= white), (low, high))


def _grey(image: Image.Image, black: float, white: float, inverted: bool) -> Image.Image:
    values = np.asarray(image).astype(np.float64)  # [H, W]
    grey = (values - black) * (255 / (white - black)) if white > black else np.zeros_like(values)
    if inverted:
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
