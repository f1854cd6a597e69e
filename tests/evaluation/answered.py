"""Benchmarks answered by a function in a model's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS
from mmprune_train.evaluation.benchmarks.load import load
from mmprune_train.evaluation.benchmarks.run import answers, numbers
from mmprune_train.evaluation.generate import COUNTS, Prediction
from mmprune_train.evaluation.questions import Question


def saying(text: Callable[[Question], str]) -> Callable[..., list[Prediction]]:
    """A model that says this."""
    return lambda questions: [
        Prediction(question, text(question), dict.fromkeys(COUNTS, 1.0)) for question in questions
    ]


def scores(name: str, root: Path, text: Callable[[Question], str], **asked: Any) -> dict[str, Any]:
    metric = BENCHMARKS[name].metric
    return numbers(answers(load(name, root, **asked).items, metric, saying(text)), metric)
