"""Several pruners on the same questions: the table of a paper, paired tests, and where a small image is not enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from mmprune_train.evaluation.run import Measured
from mmprune_train.evaluation.significance import Scored, compare

COSTS = ("visual_keep_ratio", "keep_ratio", "seconds", "peak_gib")
POINTS = ("total",)
"""Numbers that are no shares: MME's."""


@dataclass(frozen=True)
class Row:
    """One pruner on all questions."""

    label: str
    pruner: str
    """Its name."""
    dense: bool
    """It prunes nothing: the others are shares of it."""
    measured: Measured
    costs: dict[str, float | None]
    """`COSTS` over all questions."""
    set_to: dict[str, Any] | None = None
    """What was set to bring it to a budget, with the share that was wanted and reached."""
    beside: str | None = None
    """Label of the row that keeps as many tokens by averaging the image down."""


def comparison(rows: Sequence[Row]) -> dict[str, Any]:
    """For result.json: `first` (the dense row, else the first), `table` (a row a pruner), `baselines` (what is reached
    without looking), `tests` (every two rows on each column) and `downsampling_wrong`."""
    dense = next((row for row in rows if row.dense), None)
    baselines = {name: dict(found) for row in rows for name, found in row.measured.baselines.items()}
    wrong = downsampling_wrong(rows)
    return {
        "first": (dense or rows[0]).label,
        "table": [_told(row, dense) for row in rows],
        "baselines": [{"name": name, "scores": scores} for name, scores in baselines.items()],
        "tests": [test for one, other in combinations(rows, 2) for test in _tests(one, other)],
        "downsampling_wrong": [{"pruner": label, **found} for label, found in wrong.items()],
    }


def _told(row: Row, dense: Row | None) -> dict[str, Any]:
    cells = {title: {"score": column.score, "interval": column.intervals.get(column.main)} | _unit(column)
             for title, column in row.measured.columns.items()}  # fmt: skip
    more = {"set_to": row.set_to, "beside": row.beside}
    relative = None if dense is None else relative_to(row, dense)
    return {"pruner": row.label, "columns": cells, "relative": relative, **row.costs, **more}


def _unit(column: Scored) -> dict[str, str]:
    return {"number": column.main, "unit": "points" if column.main in POINTS else "share"}


def relative_to(row: Row, dense: Row) -> float | None:
    """Mean over the columns of a row's score as a share of the dense model's; None where one of those is 0."""
    pairs = [(column.score, dense.measured.columns[title].score) for title, column in row.measured.columns.items()]
    if not pairs or any(not whole or score is None for score, whole in pairs):
        return None
    return fmean(score / whole for score, whole in pairs if score is not None and whole)


def _tests(one: Row, other: Row) -> list[dict[str, Any]]:
    """The later row less the earlier one."""
    found = []
    for title, column in other.measured.columns.items():
        difference = compare(column, one.measured.columns[title])
        if difference is not None:
            found.append({"first": other.label, "second": one.label, "column": title, **asdict(difference)})
    return found


def downsampling_wrong(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For each row of downsampling, the questions with an image that it gets wrong (a score below 1/2), and every row's
    mean score on them: many questions can be answered from a small image, and say nothing of what a pruner keeps
    (VTC-Bench, arXiv 2510.07143). None where it gets none wrong."""
    found = {}
    for label in dict.fromkeys(row.beside for row in rows if row.beside):
        wrong = _scores(next(row for row in rows if row.label == label)) < 0.5
        scores = {row.label: float(_scores(row)[wrong].mean()) if wrong.any() else None for row in rows}
        found[label] = {"questions": int(wrong.sum()), "of": len(wrong), "scores": scores}
    return found


def _scores(row: Row) -> Any:
    """Of all columns' questions with an image; those that are drawn together (copies of one, its rotations, MME's pair)
    are one, as right as the least of them."""
    found = [
        column.scores[unit].min()
        for column in row.measured.columns.values()
        for unit in column.units
        if column.seen is None or column.seen[unit[0]]
    ]
    return np.array(found)
