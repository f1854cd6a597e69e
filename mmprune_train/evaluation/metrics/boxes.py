"""Boxes that a model writes as text, and how well they meet the right one."""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
NUMBER = r"(-?\d+(?:\.\d+)?)"
BOX = re.compile(r"\[\s*" + r",\s*".join([NUMBER] * 4) + r"\s*\]")
RIGHT = 0.5
"""Intersection over union from which a box is right."""


def read_box(answer: str) -> Box | None:
    """The first `[a, b, c, d]` of an answer, as lmms-eval's RefCOCO reads it; None: there is none."""
    found = BOX.search(answer)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


def iou(one: Box, other: Box) -> float:
    """Intersection over union, as lmms-eval: a box with its sides exchanged has what area the formula gives."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0, width) * max(0, height)
    union = _area(one) + _area(other) - common
    return common / union if union else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def in_padded_square(box: Box, width: float, height: float) -> Box:
    """A box in pixels as shares of the square that LLaVA pads an image to, the image in its middle."""
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    return (box[0] + left) / side, (box[1] + top) / side, (box[2] + left) / side, (box[3] + top) / side


def in_image(box: Box, width: float, height: float) -> Box:
    """A box in pixels as shares of the image's width and height."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height
