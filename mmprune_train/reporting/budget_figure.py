"""The figure of a calibration: how many tokens each budget keeps of a sample of images, and the curves it cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprune_train.reporting.canvas import drawn
from mmprune_train.reporting.figures import CURVE, DROPPED, KEPT


@dataclass
class KeptTokens:
    """What one budget keeps of each image (or sample)."""

    name: str
    tokens: NDArray[np.int64]
    """[I] with the parameter as it is set."""
    solved: NDArray[np.int64] | None
    """[I] with the parameter that meets the target, where there is one."""
    chosen: bool
    """Whether this is the run's own budget."""


@drawn
def draw_budgets(
    plt: Any,
    budgets: Sequence[KeptTokens],
    scores: NDArray[np.float64] | None,
    target: float | None,
    what: str,
    title: str,
    path: Path,
) -> None:
    """Left a histogram of kept tokens for each budget; right, where stage 1 scored, the sorted scores.

    Args:
        scores: [I, N] of stage 1.
        target: kept tokens a row that meet the target.
        what: label of the tokens' axis.
    """
    columns = 1 if scores is None else 2
    figure, axes = plt.subplots(
        1, columns, figsize=(6.5 + 5.0 * (columns - 1), 1.6 + 0.42 * len(budgets)), squeeze=False,
        width_ratios=[1.5, 1][:columns],
    )  # fmt: skip
    _histograms(axes[0][0], budgets, target, what)
    if scores is not None:
        _curves(axes[0][1], scores, target)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _histograms(axis: Any, budgets: Sequence[KeptTokens], target: float | None, what: str) -> None:
    most = max(int(tokens.max()) for b in budgets for tokens in (b.tokens, b.solved) if tokens is not None)
    edges = np.linspace(0, most, min(most, 60) + 1) + 0.5
    if target is not None:
        axis.axvline(target, color="black", lw=0.8, ls=":")
        axis.annotate("target", (target, 1), (3, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    for row, budget in enumerate(reversed(budgets)):
        for tokens, colour in ((budget.tokens, CURVE), (budget.solved, KEPT)):
            if tokens is None:
                continue
            heights, _ = np.histogram(tokens, edges)
            axis.stairs(row + 0.85 * heights / heights.max(), edges, baseline=row, fill=True, color=colour, alpha=0.45)
            axis.plot([tokens.mean()] * 2, [row, row + 0.85], color=colour, lw=1.5)
        axis.axhline(row, color=DROPPED, lw=0.5)
    axis.set_yticks(np.arange(len(budgets)) + 0.3, [b.name for b in reversed(budgets)], fontsize=9)
    for label, budget in zip(axis.get_yticklabels(), reversed(budgets), strict=True):
        label.set_fontweight("bold" if budget.chosen else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, most + 1)
    axis.set_ylim(0, len(budgets))
    axis.set_xlabel(what)
    axis.spines[["top", "right", "left"]].set_visible(False)
    handles = [axis.fill_between([], [], color=colour, alpha=0.45) for colour in (CURVE, KEPT)]
    axis.legend(handles, ["as set", "at the target"], fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.09), ncols=2,
                frameon=False)  # fmt: skip


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
    axis.set_xlabel("patches, by score")
    axis.set_ylabel("stage-1 score")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
