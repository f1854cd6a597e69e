"""What the table of an evaluation says of what was asked."""

from __future__ import annotations

from typing import Any

from mmprune_train.reporting.results import numbers
from mmprune_train.reporting.text import asked_apart, asked_text, result_table


def result(kinds: dict[str, tuple[int, int, int]], **asked: Any) -> dict[str, Any]:
    counts = {k: dict(zip(("asked", "available", "without_answer"), c, strict=True)) for k, c in kinds.items()}
    said = {"annotations": "a.json", "turns": "all", "records": None, "questions": counts, **asked}
    tokens = dict.fromkeys(("tokens_dense", "tokens_stage1", "tokens_stage2", "tokens_layer_mean", "keep_ratio"), 1.0)
    accuracy = {kind: 0.5 if asked > unknown else None for kind, (asked, _, unknown) in kinds.items() if asked}
    return {"questions": 5, "asked": said, "accuracy": accuracy, **tokens}


def test_it_says_how_many_of_how_many_and_how_to_ask_all() -> None:
    some = result({"open": (300, 1000, 0), "yes_no": (300, 9673, 0)})
    assert asked_text(some) == "300 of 1,000 open, 300 of 9,673 yes/no questions; evaluate.limit=null asks all"
    assert asked_text(result({"open": (7, 7, 0)})) == "7 of 7 open questions"
    part = asked_text(result({"open": (7, 7, 0), "count": (0, 2, 0)}, turns="first", records=9))
    assert part == (
        "7 of 7 open, 0 of 2 count questions; evaluate.kinds leaves out count; first turns alone (evaluate.turns); the "
        "first 9 records (data.evaluate.limit)"
    )


def test_what_has_no_answer_is_a_dash_and_no_number() -> None:
    found = result({"open": (3, 3, 3), "yes_no": (4, 4, 1)})
    table = result_table(found)
    assert "not scored, without an answer: 3 open, 1 yes/no" in table.splitlines()[0]
    (row,) = (line.split() for line in table.splitlines() if line.startswith("accuracy"))
    assert row == ["accuracy", "-", "0.500"]
    assert {key for key in numbers({"evaluate": found}) if "accuracy" in key or "asked" in key} == {
        "evaluate.accuracy.yes_no"
    }


def test_a_result_from_before_is_still_shown() -> None:
    old = result({"open": (1, 1, 0)})
    del old["asked"]
    assert "Evaluation: 5 questions" in result_table(old)


def test_runs_that_were_asked_different_questions_are_told_apart() -> None:
    same, other = ({"open": (7, 7, 0)}, {"open": (2, 7, 0)})
    a, b = result(same, sha256="1"), result(same, sha256="1", annotations="moved/a.json")
    assert asked_apart({"x": a, "y": b, "old": {}}) == ""
    fewer, elsewhere = result(other, sha256="1"), result(same, sha256="2", annotations="b.json")
    told = asked_apart({"x": a, "y": b, "z": fewer, "w": elsewhere})
    assert told.endswith(
        "x, y: 7 of 7 open questions of a.json | z: 2 of 7 open questions; evaluate.limit=null asks all of a.json | "
        "w: 7 of 7 open questions of b.json"
    )
