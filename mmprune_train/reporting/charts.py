"""Figures of the report as SVG that takes the page's colours, light or dark, and its width."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mmprune_train.reporting.canvas import PLAIN, style_of

INK, RULE = "#100001", "#100002"
SERIES = [f"#1000{number}" for number in range(11, 19)]
"""Stand-ins that the page's stylesheet has the colours for: `--ink`, `--rule`, `--s1` and on."""
FADED = "#100019"
COLOURS = {INK: "var(--ink)", RULE: "var(--rule)", FADED: "var(--faded)"} | {
    colour: f"var(--s{number})" for number, colour in enumerate(SERIES, 1)
}
STYLE: Any = {
    **PLAIN,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.labelsize": 9,
    "axes.grid": True,
    "legend.handlelength": 0.9,
    "legend.handletextpad": 0.4,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
}
POINTS = 300
"""Most points of a line; more are averaged in bins."""

PER_INCH, LINE = 12, 4
"""Characters of a legend in an inch, and the room of those that the line beside an entry takes."""

SMALL = (3.4, 2.1)
"""Inches of a panel."""

Line = tuple[Sequence[float], Sequence[float]]
"""Places along and upwards."""


@style_of(STYLE)
def lines(
    series: Mapping[str, Line],
    xlabel: str,
    ylabel: str,
    size: tuple[float, float] = SMALL,
    faded: Sequence[str] = (),
) -> str:
    """A line each; those in `faded` are drawn grey, behind, and not in the legend."""
    figure, axis = _axes(size)
    shown = [name for name in series if name not in faded]
    for name in faded:
        axis.plot(*thinned(*series[name]), color=FADED, lw=0.8)
    for number, name in enumerate(shown):
        axis.plot(*thinned(*series[name]), color=SERIES[number % len(SERIES)], label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(shown) > 1:
        row = sum(map(len, shown)) + LINE * len(shown)
        above = len(shown) <= 4 and row <= PER_INCH * size[0]  # in one row above the axes; else beside them
        loc, anchor, columns = ("lower left", (0, 1), len(shown)) if above else ("upper left", (1, 1), 1)
        axis.legend(loc=loc, bbox_to_anchor=anchor, ncols=columns, columnspacing=0.7)
    return _svg(figure)


@style_of(STYLE)
def scatter(
    points: Sequence[tuple[float, float]], labels: Sequence[str], links: Sequence[str], front: Sequence[int],
    xlabel: str, ylabel: str,
) -> str:  # fmt: skip
    """Runs as points that link to their sections; those of the front are joined and labelled."""
    figure, axis = _axes((6.6, 3.8))
    others = [i for i in range(len(points)) if i not in front]
    for chosen, colour, size in ((others, FADED, 30), (sorted(front, key=lambda i: points[i]), SERIES[0], 46)):
        if chosen:
            along, up = zip(*(points[i] for i in chosen), strict=True)
            axis.scatter(along, up, s=size, color=colour, zorder=3).set_urls([links[i] for i in chosen])
            if chosen is not others:
                axis.plot(along, up, color=colour, lw=1)
    there: dict[tuple[float, float], list[str]] = {}
    for i in front:
        there.setdefault(points[i], []).append(labels[i])
    for point, names in there.items():
        text = " / ".join(names[:2]) + (f" / {len(names) - 2} more" if len(names) > 2 else "")
        axis.annotate(text, point, (5, 4), textcoords="offset points", fontsize=8)
    axis.margins(0.12)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return _svg(figure)


def thinned(along: Sequence[float], up: Sequence[float]) -> Line:
    """At most POINTS points: means of neighbouring ones."""
    size = -(-len(along) // POINTS)
    if size <= 1:
        return along, up
    bins = [slice(at, at + size) for at in range(0, len(along), size)]
    return [fmean(along[b]) for b in bins], [fmean(up[b]) for b in bins]


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    if size == SMALL:  # many are drawn, and to measure a layout takes as long as to draw it
        figure = Figure(figsize=size)
        return figure, figure.subplots(gridspec_kw={"left": 0.21, "right": 0.98, "bottom": 0.21, "top": 0.87})
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    """Without a background, a size and a font of its own."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    return text
