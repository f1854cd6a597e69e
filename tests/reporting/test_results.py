"""Numbers of a result by name, and the Pareto front."""

from __future__ import annotations

import math

import pytest

from mmprune_train.errors import UserError
from mmprune_train.reporting.results import front, numbers, pick

RESULT = {
    "run": "runs/smoke/t",
    "stages": {"pretrain": {"loss": 2.0, "keep_ratio": 0.3}, "instruct": {"loss": 1.0, "keep_ratio": 0.2}},
    "evaluate": {"questions": 8, "keep_ratio": 0.1, "accuracy": {"open": 0.8, "yes_no": 0.4}, "whole": True},
    "evaluated_with": {"evaluate": {"limit": 4}},
}


def test_numbers_are_found_by_dotted_keys_and_what_was_asked_is_not_a_result() -> None:
    found = numbers(RESULT)
    assert found["stages.instruct.loss"] == 1.0 and found["evaluate.accuracy.open"] == 0.8
    assert not any(key.startswith(("run", "evaluated_with")) or key.endswith("whole") for key in found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluate.accuracy.open", 0.8),
        ("accuracy.open", 0.8),
        ("accuracy", 0.6),
        ("keep_ratio", 0.1),
        ("instruct.keep_ratio", 0.2),
        ("stages.pretrain.loss", 2.0),
    ],
)
def test_a_name_means_a_key_its_end_or_the_mean_of_a_group(name: str, value: float) -> None:
    assert pick(numbers(RESULT), name) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", "stages.pretrain.loss or stages.instruct.loss: write which"),
        ("accurcy", "did you mean accuracy"),
        ("speed", "evaluate.accuracy: open, yes_no"),
    ],
)
def test_a_name_that_means_nothing_or_too_much_is_told_with_what_there_is(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pick(numbers(RESULT), name)


def test_an_accuracy_that_was_not_measured_names_the_key_that_measures_it() -> None:
    with pytest.raises(UserError, match=r"evaluate\.after_train=true"):
        pick({"stages.pretrain.loss": 1.0}, "accuracy")


def test_the_front_is_what_no_other_beats() -> None:
    points = [(0.9, 0.5), (0.8, 0.2), (0.8, 0.3), (0.7, 0.2), (0.9, 0.5), (math.nan, 0.0)]
    assert front(points, ["maximize", "minimize"]) == [0, 1, 4]
    assert front(points, ["minimize", "maximize"]) == [0, 2, 3, 4]
    assert front([(1.0,), (3.0,), (2.0,)], ["maximize"]) == [1]
