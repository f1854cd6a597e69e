"""Which questions a record gives, and what is asked of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmprune_train.data.image_folder import ImageFolder
from mmprune_train.data.records import Record, Turn, parse_record
from mmprune_train.errors import UserError
from mmprune_train.evaluation import run
from mmprune_train.evaluation.generate import COUNTS, Prediction
from mmprune_train.evaluation.questions import Question, check_images, choose, counts_by_kind, questions_of


class Told:
    """A template that shows what it was given."""

    def prompt(self, question: str, n_images: int = 0, history: tuple[Turn, ...] = ()) -> str:
        return f"{[(turn.question, turn.answer) for turn in history]} {n_images} {question}"


def record(said: list[str], images: int = 0, **more: str) -> Record:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    item = {"id": "a", "conversations": turns, "image": [f"{n}.png" for n in range(images)] or None, **more}
    return parse_record(item, "f.json[0]", ImageFolder(Path("root")), require_answers=False)


def names(question: Question) -> list[str]:
    return [path.name for path in question.images]


def test_every_turn_is_asked_in_its_history_with_the_images_so_far() -> None:
    said = ["hello", "hi", "<image><image>\nsame?", "no", "and <image>?", "a red one", "sure?"]
    asked = questions_of(record(said, 3))
    three = ["0.png", "1.png", "2.png"]
    assert [names(question) for question in asked] == [[], three[:2], three, three]
    assert [question.turn for question in asked] == [1, 2, 3, 4]
    assert [question.answer for question in asked] == ["hi", "no", "a red one", ""]
    assert [question.kind for question in asked] == ["open", "yes_no", "open", "open"]
    assert asked[2].history == (Turn("hello", "hi"), Turn("<image><image>\nsame?", "no"))
    assert asked[1].prompt(Told()) == "[('hello', 'hi')] 2 <image><image>\nsame?"
    assert asked[3].prompt(Told()).endswith(" 0 sure?"), "its images stand in the history"


def test_the_first_turn_alone_gets_no_later_image() -> None:
    (first,) = questions_of(record(["hello", "hi", "<image>\nwhat?", "red"], 1), "first")
    assert first.images == [] and first.turn == 1 and first.history == ()
    assert questions_of(record(["<image>\nwhat?", "red"], 1))[0].turn is None


def test_a_records_kind_is_that_of_all_its_turns() -> None:
    assert [q.kind for q in questions_of(record(["a", "yes", "b", "2"], kind="count"))] == ["count", "count"]


def test_a_history_without_its_answer_is_refused_with_the_remedy() -> None:
    unanswered = record(["a", "", "b", "c"])
    with pytest.raises(UserError, match=r"f.json\[0\] \(id a\): turn 2 .* evaluate.turns=first"):
        questions_of(unanswered)
    assert len(questions_of(unanswered, "first")) == 1


def test_kinds_are_those_of_the_file_unless_they_are_named() -> None:
    asked = [Question(str(i), [], "?", "", kind) for i, kind in enumerate(["count", "yes_no", "open", "count"])]
    assert [q.id for q in choose(asked, [], 1)] == ["2", "1", "0"]
    assert [q.id for q in choose(asked, ["count"], None)] == ["0", "3"]
    with pytest.raises(UserError, match="evaluate.kinds: .* kind colour; it has open, yes_no, count"):
        choose(asked, ["open", "colour"], None)
    counts = counts_by_kind(asked, choose(asked, ["count"], 1))
    assert counts["count"] == {"asked": 1, "available": 2, "without_answer": 1}
    assert counts["open"] == {"asked": 0, "available": 1, "without_answer": 0}


def test_an_image_that_is_not_there_is_named_with_its_question(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    fine = Question("x", [tmp_path / "a.png"], "?", "", "open")
    check_images([fine, fine], ImageFolder(tmp_path))
    with pytest.raises(UserError, match=r"question y: there is no image .*b\.png"):
        check_images([fine, Question("y", [tmp_path / "b.png"], "?", "", "open")], ImageFolder(tmp_path))


def test_the_same_words_after_another_history_are_asked_again_without_their_images() -> None:
    asked = []

    def ask(questions: list[Question], tokens: int, what: str, blank: bool) -> list:
        assert blank and tokens == 4
        asked.append(list(questions))
        return [Prediction(q, q.history[0].answer if q.history else "-", dict.fromkeys(COUNTS, 1.0)) for q in questions]

    again = [
        questions_of(record(["<image>\nwhich?", colour, "say it", colour], 1))[1] for colour in ("red", "blue", "red")
    ]
    told = run.ask_blank(ask, again, 4)  # type: ignore[arg-type]
    assert len(asked[0]) == 2 and [p.text for p in told] == [p.question.answer for p in told] == ["red", "blue", "red"]
