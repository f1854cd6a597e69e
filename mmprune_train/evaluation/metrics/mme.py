"""MME's score: accuracy over questions plus accuracy over pictures, in percent (Fu et al. 2023)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_scores(answers: Iterable[tuple[str, str, bool]]) -> dict[str, float | dict[str, float] | None]:
    """As `calculation.py` of MME's evaluation tool.

    Args:
        answers: (task, picture, whether it is right), two for each picture of a task.
    Returns:
        `tasks`, each at most 200: accuracy + accuracy+, the share of pictures both of whose questions are right.
        `perception` (at most 2000), `cognition` (800) and `total`: their sums, None where a task is not there.
    """
    tasks: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for task, picture, right in answers:
        tasks[task][picture].append(right)
    scores = {}
    for task, pictures in tasks.items():
        flat = [right for pair in pictures.values() for right in pair]
        both = [all(pair) for pair in pictures.values()]
        scores[task] = sum(flat) / len(flat) * 100 + sum(both) / len(both) * 100
    perception, cognition = _sum(scores, PERCEPTION), _sum(scores, COGNITION)
    total = None if perception is None or cognition is None else perception + cognition
    return {"perception": perception, "cognition": cognition, "total": total, "tasks": scores}


def _sum(scores: dict[str, float], tasks: Iterable[str]) -> float | None:
    return sum(scores[task] for task in tasks) if all(task in scores for task in tasks) else None
