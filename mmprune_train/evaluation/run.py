"""A run's own questions: answers, the same with the images blanked, what a blind guess would reach, tokens kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mmprune_train.config.task_schema import EvaluateConfig
from mmprune_train.evaluation.asking import Asker, costs
from mmprune_train.evaluation.generate import Prediction
from mmprune_train.evaluation.metrics.exact import accuracy_by_kind, blind_majority, normalise
from mmprune_train.evaluation.questions import Question
from mmprune_train.evaluation.significance import Scored
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.files import json_text

BLIND = "blind majority (question alone)"
BLANKED = "{}, image blanked"
"""Of a pruner."""


@dataclass(frozen=True)
class Measured:
    """What a set of questions came to under one pruner."""

    result: dict[str, Any]
    """For result.json."""
    columns: Mapping[str, Scored]
    """What tables show of it, by title; what has no known answer is not among them."""
    baselines: Mapping[str, Mapping[str, float]]
    """What is reached without looking, by name and column."""
    predictions: Sequence[Prediction]
    write: Callable[[Path], None]
    """Puts the answers into a folder."""


def evaluate(
    ask: Asker,
    questions: Sequence[Question],
    training: Sequence[tuple[str, str]],
    settings: EvaluateConfig,
    blank: bool = True,
) -> Measured:
    """Ask the questions and score what is answered. The result has accuracies by kind: None for a kind of which no
    answer is known.

    Args:
        training: (question, answer) of the training split, for the blind majority; may be empty.
        blank: ask again with the images blanked, where `evaluate.blank` has it so.
    """
    tokens = settings.max_new_tokens
    seen = ask(questions, tokens)
    result: dict[str, Any] = {"questions": len(questions), **token_counts(seen), **costs(seen)}
    known = [p for p in seen if p.question.answer]
    columns = {kind: scored([p for p in known if p.question.kind == kind]) for kind in dict.fromkeys(map(_kind, known))}
    result["accuracy"] = {
        kind: columns[kind].score if kind in columns else None for kind in dict.fromkeys(q.kind for q in questions)
    }
    result["intervals"] = {kind: column.intervals.get("accuracy") for kind, column in columns.items()}
    baselines = {}
    if known and training:
        test = [(p.question.kind, p.question.plain, p.question.answer) for p in known]
        result["blind_majority"] = baselines[BLIND] = blind_majority(training, test)
    if blank and settings.blank and known:
        told = ask_blank(ask, [p.question for p in known], tokens)
        shares = accuracy_by_kind((p.question.kind, p.text, p.question.answer) for p in told)
        result["accuracy_blank"] = baselines[BLANKED.format(ask.pruner)] = shares
    return Measured(result, columns, baselines, seen, partial(write_predictions, predictions=seen))


def scored(predictions: Sequence[Prediction]) -> Scored:
    """Exact matches, normalised, of predictions whose answers are known."""
    right = [normalise(p.text) == normalise(p.question.answer) for p in predictions]
    seen = [bool(p.question.images) for p in predictions]
    return Scored([_kind(p) for p in predictions], [""] * len(predictions), np.array(right, float), seen=seen)


def _kind(prediction: Prediction) -> str:
    return prediction.question.kind


def ask_blank(ask: Asker, questions: Sequence[Question], tokens: int, what: str = "") -> list[Prediction]:
    """Answers with nothing to see. Equal words after an equal history get equal ones: each wording is asked once."""
    wordings = {_wording(question): question for question in questions}
    answers = ask(list(wordings.values()), tokens, ", ".join(filter(None, (what, "blank"))), blank=True)
    told = {_wording(p.question): p for p in answers}
    return [Prediction(question, (p := told[_wording(question)]).text, p.counts) for question in questions]


def _wording(question: Question) -> tuple[Any, ...]:
    """What is left of a question when its images are not seen."""
    return question.text, len(question.images), question.history


def token_counts(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Means over the questions of prompt tokens; `keep_ratio` is the mean of the questions' own ratios."""
    names = ("dense", "stage1", "stage2", "layer_mean")
    means = {f"tokens_{name}": fmean(p.counts[name] for p in predictions) for name in names}
    return {**means, "keep_ratio": fmean(p.counts["layer_mean"] / p.counts["dense"] for p in predictions)}


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """predictions.jsonl, one object a question; `answer` only where it is known, `turn` only where a record has
    several."""
    rows = []
    for p in predictions:
        row: dict[str, Any] = {"id": p.question.id}
        if p.question.turn is not None:
            row["turn"] = p.question.turn
        row |= {"question": p.question.plain, "prediction": p.text}
        if p.question.answer:
            row["answer"] = p.question.answer
        row |= {f"visual_tokens_{s}": int(p.counts[f"visual_{s}"]) for s in ("dense", "stage1", "stage2")}
        rows.append(json_text(row) + "\n")
    write_atomically(folder / "predictions.jsonl", "".join(rows).encode())
