"""Accuracy, precision, recall, F1 and the share of yes among answers to yes-or-no questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def binary_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """POPE's five numbers, shares of 1, as its `evaluate.py`; where that would divide by zero they are 0.

    Args:
        predictions: what was read. What is neither `yes` nor `no` is wrong, but no missed yes, as in lmms-eval.
        labels: `yes` or `no`. `yes_share` is of the predictions; lmms-eval's `yes_ratio` is of the labels.
    """
    pairs = Counter(zip(predictions, labels, strict=True))
    right = pairs["yes", "yes"]
    precision = _share(right, right + pairs["yes", "no"])
    recall = _share(right, right + pairs["no", "yes"])
    return {
        "accuracy": _share(right + pairs["no", "no"], len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_share": _share(right + pairs["yes", "no"], len(labels)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
