"""One evaluation: answers, the same with the images blanked, what a blind guess would reach, tokens kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mmprune_train.config.task_schema import EvaluateConfig
from mmprune_train.data.templates import Template
from mmprune_train.evaluation.generate import Prediction, answer, blank_images
from mmprune_train.evaluation.metrics.exact import accuracy_by_kind, blind_majority
from mmprune_train.evaluation.questions import Question
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.files import json_text


def evaluate(
    model: Any,
    processor: Any,
    template: Template,
    questions: Sequence[Question],
    training: Iterable[tuple[str, str]],
    settings: EvaluateConfig,
    save: Callable[[Sequence[Prediction]], None],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Ask the questions and score what is answered.

    Args:
        model: as `load_model` returns it.
        processor: as `load_model` returns it.
        template: conversation format of the prompts.
        training: (question, answer) of the training split, for the blind majority; may be empty.
        save: keeps the answers, as soon as they are there.
    Returns:
        Numbers for result.json, by kind where they are accuracies; None for a kind of which no answer is known.
    """
    size, tokens = settings.batch_size, settings.max_new_tokens
    ask = partial(answer, model, processor, template, batch_size=size, max_new_tokens=tokens, dtype=dtype)
    seen = ask(questions)
    save(seen)
    result: dict[str, Any] = {"questions": len(questions), **token_counts(seen)}
    known = [p for p in seen if p.question.answer]
    scored = accuracy_by_kind((p.question.kind, p.text, p.question.answer) for p in known)
    result["accuracy"] = {kind: scored.get(kind) for kind in dict.fromkeys(q.kind for q in questions)}
    pairs = list(training) if known else []
    if pairs:
        test = [(p.question.kind, p.question.plain, p.question.answer) for p in known]
        result["blind_majority"] = blind_majority(pairs, test)
    if settings.blank and known:
        result["accuracy_blank"] = _blank(ask, processor.image_processor, [p.question for p in known])
    return result


def _blank(ask: Callable[..., list[Prediction]], image_processor: Any, questions: list[Question]) -> dict[str, float]:
    """With nothing to see, equal words after an equal history get equal answers: each wording is asked once."""
    wordings = {_wording(question): question for question in questions}
    size = image_processor.crop_size or image_processor.size
    images_of = blank_images(image_processor.image_mean, size.get("height") or size.get("shortest_edge"))
    answers = ask(list(wordings.values()), images_of=images_of, title="blank")
    told = {_wording(p.question): p.text for p in answers}
    return accuracy_by_kind((q.kind, told[_wording(q)], q.answer) for q in questions)


def _wording(question: Question) -> tuple[Any, ...]:
    """What is left of a question when its images are not seen."""
    return question.text, len(question.images), question.history


def token_counts(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Means over the questions of prompt tokens; `keep_ratio` is the mean of the questions' own ratios."""
    names = ("dense", "stage1", "stage2", "layer_mean")
    means = {f"tokens_{name}": fmean(p.counts[name] for p in predictions) for name in names}
    return {**means, "keep_ratio": fmean(p.counts["layer_mean"] / p.counts["dense"] for p in predictions)}


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One object a question; `answer` only where it is known, `turn` only where a record has several."""
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
    write_atomically(path, "".join(rows).encode())
