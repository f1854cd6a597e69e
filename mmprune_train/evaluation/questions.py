"""The questions of an evaluation set, from its LLaVA-format file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmprune_train.data.records import Record, read_records
from mmprune_train.errors import UserError
from mmprune_train.evaluation.metrics import normalise


@dataclass(frozen=True)
class Question:
    """The first turn of a record."""

    id: str
    images: list[Path]
    text: str
    """With its `<image>` placeholders."""
    answer: str
    kind: str
    """`open` or `yes_no`."""
    where: str = ""
    """The sample or key that it comes from, for errors."""

    @property
    def plain(self) -> str:
        """The words alone."""
        return self.text.replace("<image>", "").strip()


def read_questions(annotations: Path, images: Path, limit: int | None = None) -> list[Question]:
    """All questions in the file's order; answers may be missing.

    A record's own `kind` counts; without one, a yes or a no as the answer makes it `yes_no`.
    """
    return [question_of(record) for record in read_records(annotations, images, limit, require_answers=False)]


def choose(questions: list[Question], kinds: list[str], per_kind: int | None) -> list[Question]:
    """The first `per_kind` questions of each kind, kind by kind.

    Raises:
        UserError: there is no question of any of these kinds.
    """
    chosen = [q for kind in kinds for q in [q for q in questions if q.kind == kind][:per_kind]]
    if not chosen:
        present = sorted({q.kind for q in questions})
        raise UserError(f"evaluate.kinds={kinds}: no such question; the file has {present or 'none at all'}")
    return chosen


def question_of(record: Record) -> Question:
    """The question of a record's first turn."""
    turn = record.turns[0]
    guessed = "yes_no" if normalise(turn.answer) in ("yes", "no") else "open"
    where = f"{record.where} (id {record.id})"
    return Question(record.id, list(record.images), turn.question, turn.answer, record.kind or guessed, where)
