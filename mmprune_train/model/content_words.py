"""The words of a question that say what to look at: those that stage 1 compares with patches one by one."""

from __future__ import annotations

import re
from collections.abc import Callable

Spell = Callable[[str], list[int]]
"""A text -> its ids in the LLM's vocabulary, without special tokens."""

LEFT_OUT = (
    " a an and answer are at be been being but by did do does for from had has have he how i if into is it onto or "
    "question she so the then they to upon was we were what when where which who why with you "
)
"""Words that MMTok (arXiv 2508.18264) takes no patch to show, each between two spaces."""


def content_words(question: str) -> str:
    """The words of a question without those `LEFT_OUT` and without punctuation, a space between them; the question as
    it is where nothing else is left."""
    words = re.findall(r"\w+", question)
    return " ".join(word for word in words if f" {word.lower()} " not in LEFT_OUT) or question
