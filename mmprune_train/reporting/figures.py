"""Figures: what both stages kept on an image, with the similarity curve and its knee."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmprune_train.reporting.canvas import PLAIN, save, style_of

Word = tuple[str, bool | None]
"""A text token of a prompt, and whether it stays."""
KEPT, CURVE, DROPPED = "#c2410c", "#1d4ed8", "#9ca3af"


@dataclass
class PrunedImage:
    """One image and its way through both stages."""

    pixels: NDArray[np.uint8]
    """[H, W, 3] as the encoder saw it."""
    grid: int
    """Patches along one side."""
    stage1: list[int]
    """Kept patches, raster order."""
    stage2: list[int]
    """Those of them that also left stage 2."""
    scores: NDArray[np.float64] | None
    """[grid * grid] stage-1 scores, where stage 1 scored."""


def faded(image: PrunedImage, kept: Sequence[int]) -> NDArray[np.uint8]:
    """The image with dropped patches washed out and grey."""
    mask = np.zeros((image.grid, image.grid), dtype=bool)
    mask.flat[list(kept)] = True
    height, width = image.pixels.shape[:2]
    shown = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    washed = 255 - (255 - image.pixels.mean(-1, keepdims=True)) * 0.18
    return np.where(np.asarray(shown)[..., None], image.pixels, washed).astype(np.uint8)


@style_of(PLAIN)
def draw(images: Sequence[PrunedImage], words: Sequence[Word], title: str, path: Path) -> None:
    """One row an image (as seen, after stage 1, after stage 2, the sorted curve), the prompt's text tokens below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.3 * len(images) + 1.3))
    axes = figure.subplots(len(images), 4, squeeze=False, width_ratios=[1, 1, 1, 1.5])
    for row, image in zip(axes, images, strict=True):
        total = image.grid**2
        panels = [
            (image.pixels, f"as the encoder sees it: {total} patches"),
            (faded(image, image.stage1), f"after stage 1: {len(image.stage1)} ({len(image.stage1) / total:.0%})"),
            (faded(image, image.stage2), f"after stage 2: {len(image.stage2)} ({len(image.stage2) / total:.0%})"),
        ]
        for axis, (pixels, caption) in zip(row[:3], panels, strict=True):
            axis.imshow(pixels)
            axis.set_title(caption, fontsize=10)
            axis.set_axis_off()
        _curve(row[3], image)
    _words(figure, words)
    save(figure, title, path, bottom=1.0 / (3.3 * len(images) + 1.3))


def _curve(axis: Any, image: PrunedImage) -> None:
    if image.scores is None:
        axis.text(0.5, 0.5, "stage 1 is off", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    curve = np.sort(image.scores)[::-1]
    knee = len(image.stage1)
    rank = np.arange(1, len(curve) + 1)
    axis.fill_between(rank[:knee], curve[:knee], color=KEPT, alpha=0.25, lw=0)
    axis.plot(rank, curve, color=CURVE, lw=1.5)
    axis.plot(knee, curve[knee - 1], "o", color=KEPT)
    point = (knee, curve[knee - 1])
    axis.annotate(f"cut after {knee}", point, (14, 14), textcoords="offset points", color=KEPT, fontsize=10)
    axis.set(xlabel="patches, by score", ylabel="stage-1 score")
    axis.set_ylim(bottom=min(0.0, float(curve[-1])))


def _words(figure: Any, words: Sequence[Word]) -> None:
    """The text tokens on wrapped lines; dropped ones struck grey."""
    width = figure.bbox.width
    x, y, line = 12.0, 62.0, 20.0
    for word, kept in [("text tokens after stage 2:  ", None), *words]:
        colour = "black" if kept is None else KEPT if kept else DROPPED
        shown = figure.text(x / width, y / figure.bbox.height, word, fontsize=9, family="monospace", color=colour)
        extent = shown.get_window_extent().width
        if x + extent > width - 12:
            x, y = 12.0, y - line
            shown.set_position((x / width, y / figure.bbox.height))
        x += extent + 5
