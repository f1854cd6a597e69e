"""An image processor's resizing, padding and cropping with bounded memory: the same bytes, computed in parts.

transformers makes the whole padded or enlarged picture, several times over, and then cuts out the middle. Pillow
enlarges first every row, then every column, each by itself, so parts of rows and of columns give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers.image_processing_backends import PilBackend

from mmprune_train.data.rgb import bands

PART = 1 << 22
"""Pixels of a part."""
MOST_WORK = 1 << 30
"""Pixels that a picture may have when it is padded or enlarged; some seconds."""
MOST_BETWEEN = 1 << 26
"""Pixels that may be left between rows and columns: 256 MiB."""
MOST_LONG = 1 << 22
"""Pixels of the long side after enlarging, of each of which Pillow holds 60 bytes of weights."""


@dataclass(frozen=True)
class Plan:
    """What is done with an image."""

    canvas: tuple[int, int]
    """Width and height after padding, the image in the middle."""
    colour: tuple[int, ...]
    """Of the padding."""
    size: tuple[int, int]
    """Width and height after resizing."""
    window: tuple[int, int, int, int]
    """What is cut out of that: left, top, right, bottom."""
    resample: Image.Resampling


def plan(processor: Any, width: int, height: int) -> Plan | None:
    """What a processor does with an image; None: it is not of a kind that is known here."""
    asked = getattr(processor, "size", None)
    if not (isinstance(processor, PilBackend) and processor.do_resize and asked):
        return None
    resample, mean = processor.resample, processor.image_mean or ()
    pads = processor.do_pad and hasattr(processor, "pad_to_square")
    colour = tuple(int(channel * 255) for channel in mean) or (0, 0, 0)
    canvas = (max(width, height),) * 2 if pads else (width, height)
    size = (asked.width, asked.height)
    window = (0, 0, *size)
    if asked.shortest_edge and not asked.longest_edge:
        short, long = asked.shortest_edge, int(asked.shortest_edge * max(canvas) / min(canvas))
        size = (short, long) if canvas[0] <= canvas[1] else (long, short)
        window = _middle(size, processor.crop_size if processor.do_center_crop else None)
    known = all(size) and isinstance(resample, int) and resample != Image.Resampling.NEAREST
    if not known or not all(0 <= channel <= 255 for channel in colour) or (pads and size[0] != size[1]):
        return None
    return Plan(canvas, colour, size, window, Image.Resampling(resample))


def _middle(size: tuple[int, int], cut: Any) -> tuple[int, int, int, int]:
    """The part of an image of this size that a centre crop needs, whose short side stays: the processor, which finds
    the same short side and cuts the rest, then resizes nothing."""
    if not cut:
        return (0, 0, *size)
    short = min(size)
    width, height = (  # as odd or even as the size, so that both have one centre
        min(side, wanted + (side - wanted) % 2)
        for side, wanted in zip(size, (max(short, cut.width), max(short, cut.height)), strict=True)
    )
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def check_size(processor: Any, width: int, height: int) -> None:
    """Raise ValueError for too long a strip: it would take seconds, or much memory, to reach the encoder's size."""
    long, short = max(width, height), max(1, min(width, height))
    how = plan(processor, short, long)  # a strip that lies is treated alike, for it may be turned
    if how is not None:
        across = how.window[2] - how.window[0]
        work = max(how.canvas[0] * long, across * how.size[1])
        fits = work <= MOST_WORK and across * how.canvas[1] <= MOST_BETWEEN and how.size[1] <= MOST_LONG
    else:
        edge = getattr(getattr(processor, "size", None), "shortest_edge", None) or 0
        padded = long**2 if getattr(processor, "do_pad", False) else 0
        fits = max(width * height, padded, edge**2 * long / short) <= MOST_BETWEEN // 2
    if not fits:
        raise ValueError(f"{width} x {height} pixels are too long a strip")


def fit(processor: Any, image: Image.Image) -> Image.Image:
    """What a processor would cut out of an RGB image, which leaves it nothing to resize; the image itself where the
    processor is of another kind."""
    how = plan(processor, *image.size)
    if how is None:
        return image
    (width, height), (left, top, right, bottom) = how.size, how.window
    if how.canvas == image.size and height < image.height:  # made smaller, perhaps columns first
        return image.resize(how.size, how.resample).crop(how.window)
    beside, above = (how.canvas[0] - image.width) // 2, (how.canvas[1] - image.height) // 2
    across = Image.new("RGB", (right - left, how.canvas[1]), how.colour)
    for row, band in bands(image, PART * image.width // max(width, how.canvas[0])):
        if band.width != how.canvas[0]:
            padded = Image.new("RGB", (how.canvas[0], band.height), how.colour)
            padded.paste(band, (beside, 0))
            band = padded
        part = band.resize((width, band.height), how.resample).crop((left, 0, right, band.height))
        across.paste(part, (0, above + row))
    cut = Image.new("RGB", (right - left, bottom - top))
    columns = max(1, PART // max(height, across.height))
    for column in range(0, across.width, columns):
        part = across.crop((column, 0, min(column + columns, across.width), across.height))
        cut.paste(part.resize((part.width, height), how.resample).crop((0, top, part.width, bottom)), (column, 0))
    return cut
