"""Scores of short answers that must be equal to the reference."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence


def normalise(answer: str) -> str:
    """Lower case, one space between words, no punctuation at either end."""
    return " ".join(answer.lower().split()).strip(" .,;:!?\"'")


def gqa_match(prediction: str, answer: str) -> bool:
    """Whether a prediction is GQA's answer: full stops at its end and its case do not count, anything else does, as
    with LLaVA's conversion followed by GQA's own `eval.py`."""
    return prediction.rstrip(".").lower() == answer


def accuracy_by_kind(rows: Iterable[tuple[str, str, str]]) -> dict[str, float]:
    """(kind, prediction, answer) -> share of correct answers of each kind: exact matches, normalised."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for kind, prediction, answer in rows:
        hits[kind].append(normalise(prediction) == normalise(answer))
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


def blind_guess(training: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """The guess of who never looks: a question's most frequent answer in training, as it is mostly spelled there (a
    letter that is no capital is read by no benchmark); of one never seen, the most frequent answer of all.

    Args:
        training: (question, answer).
    """
    per_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in training:
        per_question[normalise(question)][normalise(answer)] += 1
        overall[normalise(answer)] += 1
        spelled[normalise(answer)][answer.strip()] += 1

    def guess(question: str) -> str:
        if not (seen := per_question.get(normalise(question)) or overall):
            return ""
        return spelled[seen.most_common(1)[0][0]].most_common(1)[0][0]

    return guess


def blind_majority(training: Iterable[tuple[str, str]], test: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Accuracy by kind of `blind_guess`.

    Args:
        training: (question, answer).
        test: (kind, question, answer).
    """
    guess = blind_guess(training)
    return accuracy_by_kind((kind, guess(question), answer) for kind, question, answer in test)
