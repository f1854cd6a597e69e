"""The figure of a bench: where the seconds of a step go, and what the saving is beside the ideal one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmprune_train.reporting.canvas import PLAIN, save, style_of

COLOURS = ("#4477aa", "#ee6677", "#228833", "#66ccee", "#bbbbbb")
"""Of vision, selection, forward, backward and optimizer: Paul Tol's bright scheme, safe for colour-blind eyes."""


@style_of(PLAIN)
def draw_steps(
    seconds: Mapping[str, Mapping[str, float]],
    parts: Sequence[str],
    shares: Mapping[str, Sequence[float | None]],
    title: str,
    path: Path,
) -> None:
    """Left: a bar of seconds for each way of computing a step. Right: its share of the dense packed one.

    Args:
        seconds: way -> part -> median seconds, and their sum as `step`.
        shares: way -> the LLM's operations, the LLM's seconds and the peak memory, each as a share of the dense packed
            model's (more is not drawn); None: not to be had.
    """
    from matplotlib.figure import Figure

    names = list(seconds)
    figure = Figure(figsize=(11, 1.7 + 0.45 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1], sharey=True)
    rows = range(len(names))
    start = [0.0] * len(names)
    for part, colour in zip(parts, COLOURS, strict=True):
        width = [seconds[name].get(part, 0.0) for name in names]
        bars = left.barh(rows, width, left=start, color=colour, label=part, height=0.6)
        start = [a + b for a, b in zip(start, width, strict=True)]
    left.bar_label(bars, [f"{seconds[name]['step']:.2f} s" for name in names], padding=4, fontsize=9)
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set(xlim=(0, 1.14 * max(start)), xlabel="seconds a step, median")
    _shares(right, names, shares)
    left.legend(ncols=len(parts), loc="lower left", bbox_to_anchor=(0, 1.0))
    save(figure, title, path)


def _shares(axis: Any, names: Sequence[str], shares: Mapping[str, Sequence[float | None]]) -> None:
    marks = (("|", "ideal: operations of the LLM"), ("o", "LLM seconds"), ("x", "peak memory"))
    for kind, (mark, label) in enumerate(marks):
        found = [(value, row) for row, name in enumerate(names) if (value := shares[name][kind]) is not None]
        if found:
            size = 220 if mark == "|" else 36
            axis.scatter(*zip(*found, strict=True), marker=mark, s=size, color=COLOURS[kind * 2 % 5], label=label)
    axis.axvline(1, color="black", lw=0.8, ls=":")
    axis.set_xlim(left=0)
    axis.set_xlabel("share of the dense packed model")
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, columnspacing=1.0)
