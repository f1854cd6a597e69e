"""What a benchmark makes of its answers: a score for each item, and numbers over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mmprune_train.evaluation.benchmarks.item import Item
from mmprune_train.evaluation.metrics.binary import binary_scores
from mmprune_train.evaluation.metrics.boxes import RIGHT, Box, iou, read_box
from mmprune_train.evaluation.metrics.exact import gqa_match
from mmprune_train.evaluation.metrics.mme import mme_scores
from mmprune_train.evaluation.metrics.options import Letter, bare_letter, first_letter, llava_letter, vlmeval_letter
from mmprune_train.evaluation.metrics.soft_accuracy import evalai_accuracy, vqa_accuracy
from mmprune_train.evaluation.metrics.yes_no import bare, first_characters, first_sentence

Score = dict[str, Any]
"""`score` in 0..1, and what was read of the answer. For predictions.jsonl, and all that an aggregate needs beside the
items."""
Numbers = dict[str, Any]
"""By name, a number or more numbers by name."""


@dataclass(frozen=True)
class Metric:
    score: Callable[[Item, str], Score]
    """Of an item with known answers, and its prediction."""
    aggregate: Callable[[Sequence[Item], Sequence[Score]], Numbers]
    """Over any of the items, each as often as it comes, so that they may be drawn anew for an interval."""
    main: str
    """Which of these numbers papers print."""
    agrees_with: str
    """The scorer that gives the same."""


def by_kind(items: Sequence[Item], scores: Sequence[Score], key: str = "score") -> dict[str, float]:
    """Mean score of each kind."""
    found: dict[str, list[float]] = defaultdict(list)
    for item, score in zip(items, scores, strict=True):
        found[item.kind].append(score[key])
    return {kind: fmean(values) for kind, values in found.items()}


def mean(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    return {"accuracy": fmean(score["score"] for score in scores), "kinds": by_kind(items, scores)}


def _simple(rule: Callable[[str, Sequence[str]], float]) -> Callable[[Item, str], Score]:
    return lambda item, prediction: {"score": float(rule(prediction, item.answers))}


VQA = Metric(_simple(vqa_accuracy), mean, "accuracy", "GT-Vision-Lab/VQA vqaEval.py")
EVALAI = Metric(_simple(evalai_accuracy), mean, "accuracy", "LLaVA m4c_evaluator.py; lmms-eval textvqa, vizwiz_vqa")
GQA = Metric(
    _simple(lambda prediction, answers: gqa_match(prediction, answers[0])),
    mean,
    "accuracy",
    "LLaVA convert_gqa_for_eval.py and GQA eval.py",
)


def _pope_score(item: Item, prediction: str) -> Score:
    read = first_sentence(prediction)
    return {"score": float(read == item.answers[0]), "read": read, "bare": bare(prediction)}


def _pope_numbers(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    splits = {}
    for kind in dict.fromkeys(item.kind for item in items):
        rows = [(score, item.answers[0]) for item, score in zip(items, scores, strict=True) if item.kind == kind]
        labels = [label for _, label in rows]
        strict = binary_scores([score["bare"] for score, _ in rows], labels)
        splits[kind] = binary_scores([score["read"] for score, _ in rows], labels)
        splits[kind] |= {f"strict_{name}": strict[name] for name in ("accuracy", "f1")}
    names = ("f1", "accuracy", "yes_share", "strict_f1", "strict_accuracy")
    return {**{name: fmean(split[name] for split in splits.values()) for name in names}, "splits": splits}


POPE = Metric(_pope_score, _pope_numbers, "f1", "POPE evaluate.py, LLaVA eval_pope.py; strict_*: lmms-eval pope")


def _mme_score(item: Item, prediction: str) -> Score:
    read = first_characters(prediction)
    return {"score": float(read == item.answers[0]), "read": read}


def _mme_numbers(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    rows = zip(items, scores, strict=True)
    return {
        **mme_scores((item.kind, item.group, bool(score["score"])) for item, score in rows),
        "accuracy": fmean(score["score"] for score in scores),
        "read_as_neither": sum(score["read"] == "other" for score in scores),
    }


MME = Metric(_mme_score, _mme_numbers, "total", "MME eval_tool/calculation.py")


def _letter_score(item: Item, read: Letter) -> Score:
    return {"score": float(read.letter == item.answers[0]), "read": read.letter, "how": read.how}


def _how(scores: Sequence[Score]) -> dict[str, dict[str, int]]:
    """By how the letter was read: answers, and right ones among them."""
    found: dict[str, dict[str, int]] = {}
    for score in scores:
        counts = found.setdefault(score["how"], {"answers": 0, "right": 0})
        counts["answers"] += 1
        counts["right"] += int(score["score"])
    return found


def _lettered(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    return {**mean(items, scores), "read": _how(scores)}


def _scienceqa_numbers(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    kinds = by_kind(items, scores)
    return {"accuracy_image": kinds.get("image"), **_lettered(items, scores)}


SCIENCEQA = Metric(
    lambda item, prediction: _letter_score(item, llava_letter(prediction, "".join(item.options))),
    _scienceqa_numbers,
    "accuracy_image",
    "LLaVA eval_science_qa.py",
)


def _mmbench_numbers(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    """A question is right where all its rotations are; `accuracy_single` is over the rows as they stand."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[item.group].append(number)
    first = [items[numbers[0]] for numbers in groups.values()]
    circular = [{"score": float(all(scores[n]["score"] for n in numbers))} for numbers in groups.values()]
    return {
        **mean(first, circular),
        "accuracy_single": fmean(score["score"] for score in scores),
        "read": _how(scores),
    }


MMBENCH = Metric(
    lambda item, prediction: _letter_score(item, vlmeval_letter(prediction, item.options)),
    _mmbench_numbers,
    "accuracy",
    "VLMEvalKit, circular, judge exact_matching (no LLM)",
)


def _seed_score(item: Item, prediction: str) -> Score:
    found = _letter_score(item, bare_letter(prediction, "".join(item.options)))
    return {**found, "first_letter": float(first_letter(prediction) == item.answers[0].lower())}


def _seed_numbers(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    return {**_lettered(items, scores), "accuracy_first_letter": fmean(score["first_letter"] for score in scores)}


SEED = Metric(
    _seed_score,
    _seed_numbers,
    "accuracy",
    "LLaVA convert_seed_for_submission.py; accuracy_first_letter: lmms-eval seedbench",
)


def _box_score(item: Item, prediction: str) -> Score:
    read, right = read_box(prediction), box_of(item.extra)
    overlap = iou(read or (0.0, 0.0, 0.0, 0.0), right)
    return {"score": float(overlap >= RIGHT), "iou": overlap, "read": None if read is None else list(read)}


def box_of(extra: Mapping[str, Any]) -> Box:
    left, top, right, bottom = extra["box"]
    return left, top, right, bottom


def _box_numbers(items: Sequence[Item], scores: Sequence[Score]) -> Numbers:
    return {
        **mean(items, scores),
        "iou": fmean(score["iou"] for score in scores),
        "without_a_box": sum(score["read"] is None for score in scores),
    }


REFCOCO = Metric(_box_score, _box_numbers, "accuracy", "lmms-eval refcoco_bbox_rec ACC@0.5, boxes in either frame")
