"""A benchmark's items asked, and what becomes of the answers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmprune_train.evaluation.benchmarks.item import Item
from mmprune_train.evaluation.benchmarks.scoring import Metric, Numbers, Score, mean
from mmprune_train.evaluation.generate import Prediction
from mmprune_train.evaluation.questions import Question
from mmprune_train.evaluation.significance import Scored
from mmprune_train.reporting.results import numbers as flat
from mmprune_train.storage.files import json_text

Ask = Callable[[Sequence[Question]], list[Prediction]]
"""A model's answers to questions, in their order."""


@dataclass(frozen=True)
class Answer:
    item: Item
    prediction: Prediction
    score: Score | None
    """None: the right answer is not known here."""

    @property
    def row(self) -> dict[str, Any]:
        """Of predictions.jsonl."""
        item, counts = self.item, self.prediction.counts
        row: dict[str, Any] = {
            "id": item.id,
            "kind": item.kind,
            "question": item.prompt,
            "prediction": self.prediction.text,
        }
        if item.answers:
            row["answer"] = item.answers[0] if len(item.answers) == 1 else list(item.answers)
        return (
            row
            | (self.score or {})
            | {f"visual_tokens_{s}": int(counts[f"visual_{s}"]) for s in ("dense", "stage1", "stage2")}
        )


def answers(items: Sequence[Item], metric: Metric | None, ask: Ask) -> list[Answer]:
    """Ask the items, those that are the same to a model once, and score each answer that can be."""
    first: dict[Any, Item] = {}
    for item in items:
        first.setdefault((item.images, item.prompt), item)
    told = dict(zip(first, ask([item.question for item in first.values()]), strict=True))
    return judged(items, metric, [told[item.images, item.prompt] for item in items])


def judged(items: Sequence[Item], metric: Metric | None, predictions: Sequence[Prediction]) -> list[Answer]:
    """Predictions for the items, each scored where it can be."""
    found = []
    for item, prediction in zip(items, predictions, strict=True):
        score = metric.score(item, prediction.text) if metric is not None and item.answers else None
        found.append(Answer(item, prediction, score))
    return found


def scored(found: Sequence[Answer], metric: Metric) -> Scored | None:
    """Scores of the answers that have one; None where none has, or the metric's main number cannot be told."""
    items, scores = _with_scores(found)
    if not items:
        return None
    asked: dict[Any, int] = {}
    for item in items:
        asked.setdefault((item.images, item.prompt), len(asked))

    @functools.cache
    def copy_of(number: int, copy: int) -> Item:
        """An item in the group of its own copy: a picture that is drawn twice is two pictures."""
        item = items[number]
        return replace(item, group=f"{copy}/{item.group}") if item.group else item

    def numbers_of(drawn: Sequence[Sequence[int]]) -> dict[str, float]:
        times = Counter[int]()
        chosen = list[tuple[Item, Score]]()
        for unit in drawn:
            times[unit[0]] += 1
            chosen += [(copy_of(number, times[unit[0]]), scores[number]) for number in unit]
        return flat(metric.aggregate([item for item, _ in chosen], [score for _, score in chosen]))

    result = Scored(
        [item.kind for item in items],
        [f"{i.kind}/{i.group}" if i.group else f"same {asked[i.images, i.prompt]}" for i in items],
        np.array([score["score"] for score in scores], float),
        metric.main,
        None if metric.aggregate is mean else numbers_of,
        [bool(item.images) for item in items],
    )
    return result if result.score is not None else None


def numbers(found: Sequence[Answer], metric: Metric | None) -> Numbers:
    """The metric over the answers that are scored; empty where none is."""
    items, scores = _with_scores(found)
    return metric.aggregate(items, scores) if metric is not None and items else {}


def _with_scores(found: Sequence[Answer]) -> tuple[list[Item], list[Score]]:
    pairs = [(answer.item, answer.score) for answer in found if answer.score is not None]
    return [item for item, _ in pairs], [score for _, score in pairs]


def main_number(scores: Numbers, metric: Metric | None) -> float | None:
    """What papers print of it; None where it cannot be told."""
    return None if metric is None else scores.get(metric.main)


def counts(available: Sequence[Item], asked: Sequence[Item]) -> dict[str, dict[str, int]]:
    """For every kind, how many questions were asked, are there, and of those asked have no known answer."""
    there, taken = Counter(i.kind for i in available), Counter(i.kind for i in asked)
    unknown = Counter(i.kind for i in asked if not i.answers)
    return {kind: {"asked": taken[kind], "available": there[kind], "without_answer": unknown[kind]} for kind in there}


def prediction_lines(found: Sequence[Answer]) -> bytes:
    """predictions.jsonl, one object a question."""
    return "".join(json_text(answer.row) + "\n" for answer in found).encode()
