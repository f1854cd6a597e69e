"""One question of a benchmark, whichever file it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmprune_train.data.records import IMAGE_PLACEHOLDER
from mmprune_train.evaluation.pictures import Picture
from mmprune_train.evaluation.questions import Question

QUESTION = "{question}"
"""Stands in a prompt where the benchmark's question goes, with its context and options."""


@dataclass(frozen=True)
class Item:
    id: str
    images: tuple[Picture, ...]
    prompt: str
    """All that is asked, without image placeholders."""
    answers: tuple[str, ...]
    """What it is scored against; empty where a server keeps the answers, or a judge needs none."""
    kind: str
    """Category by which scores are told."""
    split: str
    where: str
    """File, and line or entry, for messages."""
    group: str = ""
    """Of the items that are scored together: MME's two questions of a picture, MMBench's rotations of a question."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text, where options are given."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More that the metric or the submission file needs."""

    @property
    def question(self) -> Question:
        """For generation: images come first, a line each, as LLaVA's evaluation puts them."""
        text = f"{IMAGE_PLACEHOLDER}\n" * len(self.images) + self.prompt
        answer = self.answers[0] if self.answers else ""
        return Question(self.id, list(self.images), text, answer, self.kind, where=self.where)


@dataclass(frozen=True)
class Asked:
    """How a benchmark is asked."""

    prompt: str
    """With `{question}` in it."""
    split: str | None = None
    """None: the first that is there of those whose answers are known, then of those that a server scores."""
    ocr_tokens: bool = True
    """TextVQA: with the OCR tokens that LLaVA adds to the question."""
    box_frame: str = "padded"
    """RefCOCO: whether boxes are shares of the `padded` square, as LLaVA learns them, or of the `image`."""

    def prompted(self, question: str) -> str:
        return self.prompt.replace(QUESTION, question)


@dataclass(frozen=True)
class Loaded:
    """What a benchmark's files hold."""

    items: list[Item]
    files: list[Path]
    """Those that were read."""
    notes: tuple[str, ...] = ()
    """What is not there, with where to get it; the rest is asked all the same."""
    ids: tuple[str, ...] = ()
    """Of all its questions, also of those whose images are not there."""
    others: tuple[Any, ...] = ()
    """More ids that a submission file must have."""


def with_options(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """A context, the question and its options, a line each, as LLaVA's evaluation writes them."""
    lines = [hint] if hint else []
    return "\n".join([*lines, question, *(f"{letter}. {text}" for letter, text in options.items())])


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """Texts by A, B, C, ..."""
    return dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", texts, strict=False))
