"""Accuracy against several annotators: an answer that three of the others gave is right (VQA, Antol et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from mmprune_train.evaluation.metrics.vqa_text import evalai_normalised, trimmed, vqa_normalised

ENOUGH = 3
"""Annotators who must agree."""


def leave_one_out(answer: str, references: Sequence[str]) -> float:
    """Mean, over the annotators who are left out in turn, of min(1, matches among the others / 3)."""
    matches = [reference == answer for reference in references]
    scores = [min(1, float(sum(matches) - match) / ENOUGH) for match in matches]
    return float(sum(scores)) / len(scores)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQAv2's, as GT-Vision-Lab/VQA: where all annotators wrote the same, nothing is normalised.

    lmms-eval normalises then, too: there `Yes` is right after ten times `yes`, here it is not.
    """
    prediction, references = trimmed(prediction), [trimmed(reference) for reference in references]
    if len(set(references)) > 1:
        prediction, references = vqa_normalised(prediction), [vqa_normalised(one) for one in references]
    return leave_one_out(prediction, references)


def evalai_accuracy(prediction: str, references: Sequence[str]) -> float:
    """TextVQA's and VizWiz's, as LLaVA's `m4c_evaluator.py` and lmms-eval."""
    return leave_one_out(evalai_normalised(prediction), [evalai_normalised(one) for one in references])
