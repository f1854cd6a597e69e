"""The figure of a calibration: how many tokens each budget keeps of a sample of images, and the curves it cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprune_train.reporting.canvas import PLAIN, save, style_of
from mmprune_train.reporting.figures import CURVE, DROPPED, KEPT

Kept = tuple[NDArray[np.int64], NDArray[np.int64] | None]
"""[I] tokens that a budget keeps of each image (or sample) as it is set, and with the parameter that meets the target,
where there is one."""


@style_of(PLAIN)
def draw_budgets(
    budgets: Mapping[str, Kept],
    own: str,
    scores: NDArray[np.float64] | None,
    target: float | None,
    what: str,
    title: str,
    path: Path,
) -> None:
    """Left a histogram of kept tokens for each budget; right, where stage 1 scored, the sorted scores.

    Args:
        own: the run's own budget.
        scores: [I, N] of stage 1.
        target: kept tokens a row that meet the target.
        what: label of the tokens' axis.
    """
    from matplotlib.figure import Figure

    columns = 1 if scores is None else 2
    figure = Figure(figsize=(6.5 + 5.0 * (columns - 1), 1.6 + 0.42 * len(budgets)))
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=[1.5, 1][:columns])
    _histograms(axes[0][0], budgets, own, target, what)
    if scores is not None:
        _curves(axes[0][1], scores, target)
    save(figure, title, path)


def _histograms(axis: Any, budgets: Mapping[str, Kept], own: str, target: float | None, what: str) -> None:
    most = max(int(tokens.max()) for kept in budgets.values() for tokens in kept if tokens is not None)
    edges = np.linspace(0, most, min(most, 60) + 1) + 0.5
    if target is not None:
        axis.axvline(target, color="black", lw=0.8, ls=":")
        axis.text(target, 1, " target", transform=axis.get_xaxis_transform(), va="bottom", fontsize=8)
    names = list(budgets)[::-1]
    for row, name in enumerate(names):
        for tokens, colour in zip(budgets[name], (CURVE, KEPT), strict=True):
            if tokens is None:
                continue
            heights, _ = np.histogram(tokens, edges)
            axis.stairs(row + 0.85 * heights / heights.max(), edges, baseline=row, fill=True, color=colour, alpha=0.45)
            axis.plot([tokens.mean()] * 2, [row, row + 0.85], color=colour, lw=1.5)
        axis.axhline(row, color=DROPPED, lw=0.5)
    axis.set_yticks(np.arange(len(budgets)) + 0.3, names, fontsize=9)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == own else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, most + 1), ylim=(0, len(budgets)), xlabel=what)
    axis.spines["left"].set_visible(False)
    handles = [axis.fill_between([], [], color=colour, alpha=0.45) for colour in (CURVE, KEPT)]
    axis.legend(handles, ["as set", "at the target"], loc="upper right", bbox_to_anchor=(1, 1.09), ncols=2)


def _curves(axis: Any, scores: NDArray[np.float64], target: float | None) -> None:
    curves = -np.sort(-scores, axis=1)
    rank = np.arange(1, curves.shape[1] + 1)
    low, middle, high = np.percentile(curves, [5, 50, 95], axis=0)
    axis.fill_between(rank, low, high, color=CURVE, alpha=0.2, lw=0, label="5th to 95th percentile of the images")
    axis.plot(rank, middle, color=CURVE, lw=1.5, label="median")
    if target is not None:
        axis.axvline(target, color="black", lw=0.8, ls=":")
    if curves.max() > 10 * curves.min() > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as formulas
    axis.set(xlabel="patches, by score", ylabel="stage-1 score")
    axis.legend()
