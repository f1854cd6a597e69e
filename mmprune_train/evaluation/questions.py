"""The questions of an evaluation set, from its LLaVA-format file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmprune_train.data.image_folder import ImageFolder
from mmprune_train.data.images import unreadable
from mmprune_train.data.records import IMAGE_PLACEHOLDER, Record, Turn, read_annotations
from mmprune_train.data.templates import Template
from mmprune_train.errors import UserError
from mmprune_train.evaluation.metrics.exact import normalise
from mmprune_train.evaluation.pictures import Picture
from mmprune_train.storage.user_files import file_status, short

FIRST_KINDS = ("open", "yes_no")
"""Kinds that come first where nothing else is asked for: those that a question without one gets."""


@dataclass(frozen=True)
class Question:
    """A turn of a record, with what was said before it."""

    id: str
    images: Sequence[Picture]
    """Those of the turns before it, then its own, in the order of the placeholders."""
    text: str
    """With its `<image>` placeholders."""
    answer: str
    """Empty where it is not known."""
    kind: str
    """`open`, `yes_no` or the record's own."""
    history: tuple[Turn, ...] = ()
    """The turns before it, with their reference answers."""
    turn: int | None = None
    """Number of the turn, from 1, in a record that has several."""
    where: str = ""
    """The sample or key that it comes from, for errors."""

    @property
    def plain(self) -> str:
        """The words alone."""
        return self.text.replace(IMAGE_PLACEHOLDER, "").strip()

    def prompt(self, template: Template) -> str:
        """The text to generate from. Images that no placeholder stands for come before the question."""
        placed = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in self.history)
        return template.prompt(self.text, n_images=len(self.images) - placed, history=self.history)


def read_questions(
    annotations: Path, images: ImageFolder | Path, limit: int | None = None, turns: str = "all"
) -> list[Question]:
    """All questions in the file's order; answers may be missing.

    Args:
        limit: the first N records.
        turns: `all` or `first`.
    """
    records = read_annotations(annotations, images, limit, require_answers=False).records
    return [question for record in records for question in questions_of(record, turns)]


def questions_of(record: Record, turns: str = "all") -> list[Question]:
    """Every turn of a record as a question of its own, or the first alone.

    A record's own `kind` counts; without one, a yes or a no as the answer makes a question `yes_no`.

    Raises:
        UserError: an answer that a later question's history needs is missing.
    """
    asked = record.turns[:1] if turns == "first" else record.turns
    questions, placed = [], 0
    for number, turn in enumerate(asked, 1):
        if number > 1 and not asked[number - 2].answer:
            raise UserError(
                f"{record.told}: turn {number} is asked after turn {number - 1} with its answer, "
                "which is missing; write it, or set evaluate.turns=first"
            )
        placed += turn.question.count(IMAGE_PLACEHOLDER)
        kind = record.kind or ("yes_no" if normalise(turn.answer) in ("yes", "no") else "open")
        shown, several = record.images[:placed], len(record.turns) > 1
        history, place = tuple(asked[: number - 1]), number if several else None
        where = record.told
        questions.append(Question(record.id, shown, turn.question, turn.answer, kind, history, place, where))
    return questions


def choose(questions: Sequence[Question], kinds: Sequence[str], per_kind: int | None) -> list[Question]:
    """The first `per_kind` questions of each kind, kind by kind; no `kinds`: all that there are.

    Raises:
        UserError: there is no question of one of these kinds.
    """
    present = dict.fromkeys(q.kind for q in questions)
    usual = sorted(present, key=lambda kind: FIRST_KINDS.index(kind) if kind in FIRST_KINDS else len(FIRST_KINDS))
    wanted = list(dict.fromkeys(kinds)) or usual
    for kind in wanted:
        if kind not in present:
            raise UserError(f"evaluate.kinds: the file has no question of kind {kind}; it has {', '.join(usual)}")
    return [q for kind in wanted for q in [q for q in questions if q.kind == kind][:per_kind]]


def check_images(questions: Sequence[Question], folder: ImageFolder) -> None:
    """Raise UserError, with the question, for an image that is not there, or not in the folder; none is opened."""
    first: dict[Path, Question] = {}
    for question in questions:
        for path in question.images:
            assert isinstance(path, Path)
            first.setdefault(path, question)
    for path, question in first.items():
        who = f"question {short(question.id, 80)}"
        folder.check(path, who)
        try:
            file_status(path)
        except FileNotFoundError:
            raise UserError(
                f"{who}: there is no image {short(str(path), 500)}; correct the record or data.evaluate.images"
            ) from None
        except OSError as error:
            raise unreadable(path, who, error) from None


def counts_by_kind(questions: Sequence[Question], chosen: Sequence[Question]) -> dict[str, dict[str, int]]:
    """For every kind of the file how many questions were asked, how many there are, and how many of those that were
    asked have no known answer."""
    available, asked = Counter(q.kind for q in questions), Counter(q.kind for q in chosen)
    unknown = Counter(q.kind for q in chosen if not q.answer)
    order = [*dict.fromkeys(q.kind for q in (*chosen, *questions))]
    return {
        kind: {"asked": asked[kind], "available": available[kind], "without_answer": unknown[kind]} for kind in order
    }
