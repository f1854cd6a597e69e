"""Pieces of a rendered conversation, each with what it is and whether it is trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmprune_train.data.records import IMAGE_PLACEHOLDER
from mmprune_train.packed.sequence import Kind


@dataclass(frozen=True)
class Span:
    """A piece of the rendered text. Special tokens in it become VISUAL or SPECIAL when it is not supervised."""

    text: str
    kind: Kind
    turn: int
    supervised: bool = False


def question_spans(question: str, turn: int) -> list[Span]:
    """The images of a question first, each followed by a newline, then its words."""
    images = question.count(IMAGE_PLACEHOLDER)
    words = question.replace(IMAGE_PLACEHOLDER, "").strip()
    placeholders = (IMAGE_PLACEHOLDER + "\n") * images
    spans = [Span(placeholders if words else placeholders.rstrip("\n"), Kind.SPECIAL, turn)]
    return [span for span in [*spans, Span(words, Kind.PROMPT, turn)] if span.text]


def lead_spans(text: str, header: str, special: re.Pattern[str]) -> list[Span]:
    """What stands before the first question: the header, the system text up to its end token, and the rest."""
    spans = []
    if header and text.startswith(header):
        spans.append(Span(header, Kind.SPECIAL, 0))
        text = text[len(header) :]
    found = special.search(text)
    words = text[: found.start()] if found else text
    words = words.rstrip()
    spans += [Span(words, Kind.PROMPT, 0), Span(text[len(words) :], Kind.SPECIAL, 0)]
    return [span for span in spans if span.text]
