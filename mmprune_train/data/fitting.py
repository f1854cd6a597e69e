"""An image processor's resizing, padding and cropping with bounded memory: the same bytes.

transformers makes the whole padded or enlarged picture, several times over, and then cuts out the middle. Of a strip
that is enlarged only the middle is made here, and what is padded is resized in bands of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend

from mmprune_train.data.rgb import bands

MOST_PIXELS = 1 << 25
"""That are made on the way to the encoder's size: 128 MiB."""
MOST_PADDED = 1 << 29
"""Pixels of a padded square, of which a band is held at a time: they take a second or two."""
BITS = 22
"""Of the whole numbers that Pillow's weights are rounded to."""


@dataclass(frozen=True)
class Plan:
    """What is done with an image."""

    image: tuple[int, int]
    """Its width and height."""
    canvas: tuple[int, int]
    """The same after padding, the image in the middle."""
    colour: tuple[int, ...]
    """Of the padding."""
    size: tuple[int, int]
    """Width and height after resizing."""
    window: tuple[int, int, int, int]
    """What is cut out of that: left, top, right, bottom."""
    resample: Image.Resampling

    @property
    def pads(self) -> bool:
        return self.canvas != self.image

    @property
    def strip(self) -> bool:
        """Whether it is enlarged to so much that only the middle is to be made."""
        enlarged = self.image[0] <= self.size[0] and self.image[1] <= self.size[1]
        return math.prod(self.size) > MOST_PIXELS and enlarged and self.resample == Image.Resampling.BICUBIC

    def possible(self) -> bool:
        """Whether time and memory are bounded."""
        if self.pads:
            return math.prod(self.canvas) <= MOST_PADDED
        left, top, right, bottom = self.window if self.strip else (0, 0, *self.size)
        return (right - left) * (bottom - top) <= MOST_PIXELS


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
    return Plan((width, height), canvas, colour, size, window, Image.Resampling(resample))


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
    how = plan(processor, width, height)
    long, short = max(width, height), max(1, min(width, height))
    if how is not None:
        fits = how.possible()
    else:
        edge = getattr(getattr(processor, "size", None), "shortest_edge", None) or 0
        padded = long**2 if getattr(processor, "do_pad", False) else 0
        fits = max(width * height, padded, edge**2 * long / short) <= MOST_PIXELS
    if not fits:
        raise ValueError(f"{width} x {height} pixels are too long a strip")


def fit(processor: Any, image: Image.Image) -> Image.Image:
    """What a processor would cut out of an RGB image, which leaves it nothing to resize; the image itself where the
    processor is of another kind."""
    how = plan(processor, *image.size)
    if how is None:
        return image
    if how.pads:
        return _padded(how, image)
    return _middle_of_strip(how, image) if how.strip else image.resize(how.size, how.resample).crop(how.window)


def _padded(how: Plan, image: Image.Image) -> Image.Image:
    """Pillow resizes rows before columns where both change alike, each row by itself."""
    (width, height), (canvas, long) = how.size, how.canvas
    rows = Image.new("RGB", (width, long), how.colour)
    for top, band in bands(image, MOST_PIXELS // 8 * image.width // canvas):
        whole = Image.new("RGB", (canvas, band.height), how.colour)
        whole.paste(band, ((canvas - image.width) // 2, 0))
        rows.paste(whole.resize((width, band.height), how.resample), (0, (long - image.height) // 2 + top))
    return rows.resize((width, height), how.resample).crop(how.window)


def _middle_of_strip(how: Plan, image: Image.Image) -> Image.Image:
    """Pillow enlarges rows before columns; the short side whole, of the long one what is needed."""
    (width, height), (left, top, right, bottom) = how.size, how.window
    if width > height:
        places, weights = _enlarging(image.width, width, left, right)
        first, last = int(places.min()), int(places.max()) + 1
        part = np.asarray(image.crop((first, 0, last, image.height))).swapaxes(0, 1)
        return Image.fromarray(_mix(part, places - first, weights).swapaxes(0, 1).copy()).resize(
            (right - left, height), how.resample
        )
    places, weights = _enlarging(image.height, height, top, bottom)
    first, last = int(places.min()), int(places.max()) + 1
    part = np.asarray(image.crop((0, first, image.width, last)).resize((width, last - first), how.resample))
    return Image.fromarray(_mix(part, places - first, weights))


def _mix(part: np.ndarray, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[n, w, 3] bytes to [k, w, 3]: the rows at `places` [k, 4], by their weights."""
    total = np.full((len(places), *part.shape[1:]), 1 << (BITS - 1), dtype=np.int64)
    for place, weight in zip(places.T, weights.T, strict=True):
        total += part[place].astype(np.int64) * weight[:, None, None]
    return (total >> BITS).clip(0, 255).astype(np.uint8)


def _enlarging(size: int, enlarged: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's bicubic weights, whole numbers, for places `start` to `stop` of a side that is enlarged, and the four
    places of the side that they are for: both [k, 4]."""
    centre = (np.arange(start, stop) + 0.5) * (size / enlarged)
    places = (np.floor(centre - 1.5)[:, None] + np.arange(4)).astype(np.int64)
    away = np.abs(places - centre[:, None] + 0.5)
    near = (1.5 * away - 2.5) * away * away + 1
    far = (((away - 5) * away + 8) * away - 4) * -0.5
    weights = np.where(away < 1, near, np.where(away < 2, far, 0.0)) * ((places >= 0) & (places < size))
    weights = weights / weights.sum(axis=1, keepdims=True)
    whole = np.trunc(weights * (1 << BITS) + np.copysign(0.5, weights)).astype(np.int64)
    return places.clip(0, size - 1), whole
