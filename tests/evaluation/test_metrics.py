"""Scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmprune_train.errors import UserError
from mmprune_train.evaluation.generate import Prediction
from mmprune_train.evaluation.metrics.exact import accuracy_by_kind, blind_majority, normalise
from mmprune_train.evaluation.questions import Question, choose
from mmprune_train.evaluation.run import token_counts


def question(kind: str, number: int = 0, answer: str = "red") -> Question:
    return Question(f"{kind}{number}", [Path("a.png")], "<image>\nWhat colour?", answer, kind)


def test_case_spaces_and_closing_punctuation_do_not_count() -> None:
    assert normalise("  Dark  Red. ") == "dark red"
    assert accuracy_by_kind([("a", "Yes.", "yes"), ("b", "yes it is", "yes")]) == {"a": 1, "b": 0}


def test_accuracy_is_by_kind() -> None:
    rows = [("open", "red", "red"), ("open", "blue", "red"), ("yes_no", "no", "no")]
    assert accuracy_by_kind(rows) == {"open": 0.5, "yes_no": 1.0}


def test_blind_majority_guesses_by_question_and_falls_back_to_the_commonest_answer() -> None:
    training = [("Colour?", "red"), ("colour? ", "red"), ("colour?", "blue"), ("Shape?", "circle")]
    test = [("open", "colour?", "Red"), ("open", "colour?", "blue"), ("open", "shape?", "circle"), ("new", "x?", "red")]
    assert blind_majority(training, test) == {"open": pytest.approx(2 / 3), "new": 1.0}


def test_the_limit_is_per_kind_and_the_first_ones_are_taken() -> None:
    questions = [question("open", i) if i % 3 else question("yes_no", i) for i in range(12)]
    assert [q.id for q in choose(questions, ["open", "yes_no"], 2)] == ["open1", "open2", "yes_no0", "yes_no3"]
    with pytest.raises(UserError, match="evaluate.kinds"):
        choose(questions, ["other"], None)


def test_keep_ratio_is_the_mean_of_the_questions_ratios() -> None:
    counts = {"stage1": 1.0, "stage2": 1.0}
    seen = [
        Prediction(question("open"), "", {**counts, "dense": 10.0, "layer_mean": 5.0}),
        Prediction(question("open"), "", {**counts, "dense": 100.0, "layer_mean": 10.0}),
    ]
    found = token_counts(seen)
    assert found["keep_ratio"] == pytest.approx(0.3) and found["tokens_dense"] == 55
