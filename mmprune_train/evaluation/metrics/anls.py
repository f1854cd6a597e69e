"""Average normalised Levenshtein similarity, for answers that are read off documents (Biten et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5
"""Similarity below which an answer is wrong altogether."""


def anls(prediction: str, references: Sequence[str], threshold: float = THRESHOLD) -> float:
    """Similarity to the nearest reference, in 0..1, as lmms-eval and VLMEvalKit (DocVQA, InfoVQA): case and runs of
    spaces do not count in the distance, but the length it is divided by is that of the texts as written.

    LLaVA's `m4c_evaluator.py` (ST-VQA) trims the ends alone, of the length, too.
    """
    told = _plain(prediction)
    shares = []
    for reference in references:
        length = max(len(reference.upper()), len(prediction.upper()))
        shares.append(distance(_plain(reference), told) / length if length else 0.0)
    similarity = 1 - min(shares)
    return 0.0 if similarity < threshold else similarity


def distance(one: str, other: str) -> int:
    """Characters to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(one) + 1))
    for down, letter in enumerate(other, 1):
        above, row = row, [down]
        for right, known in enumerate(one, 1):
            row.append(min(above[right] + 1, row[-1] + 1, above[right - 1] + (letter != known)))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
