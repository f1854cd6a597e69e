"""The letter of an option read out of an answer, and how: what a benchmark's scorer accepts, and no more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

SENTENCE = re.compile(r"The answer is ([A-Z]).")
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
AROUND = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEAR_THE_END = 4
"""Words from the end among which VLMEvalKit looks for a letter."""
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"


class Letter(NamedTuple):
    """What was read."""

    letter: str
    """Empty where nothing was."""
    how: str
    """`letter`: the answer is the letter; `start`: it begins `A. `; `sentence`: it says so in a sentence; `word`: one
    letter stands alone in it; `text`: it has one option's text; `refused`: it declines; `none`."""


NOTHING = Letter("", "none")


def llava_letter(answer: str, letters: str) -> Letter:
    """As LLaVA's `eval_science_qa.py`: the bare letter, `A. ...`, or one `The answer is A.`"""
    if len(answer) == 1 and answer in "ABCDE":
        found = Letter(answer, "letter")
    elif answer[:1] in set("ABCDE") and answer[1:3] == ". ":
        found = Letter(answer[0], "start")
    else:
        told = SENTENCE.findall(answer)
        found = Letter(told[0], "sentence") if len(told) == 1 else NOTHING
    return found if found.letter in set(letters) else NOTHING


def bare_letter(answer: str, letters: str) -> Letter:
    """As LLaVA's `convert_seed_for_submission.py`: the answer must be the letter and nothing else."""
    return Letter(answer, "letter") if answer in set(letters) else NOTHING


def first_letter(answer: str) -> str:
    """First character, in lower case, as lmms-eval's SEED-Bench reads it: `Cats` is a c there."""
    return answer.strip()[:1].lower()


def vlmeval_letter(answer: str, options: Mapping[str, str]) -> Letter:
    """As `can_infer` of VLMEvalKit, which its `exact_matching` judge, MMBench's without an LLM, has alone.

    Args:
        options: letter -> text.
    """
    found = _written_letter(answer, options)
    return found if found is not NOTHING else _quoted_option(answer, options)


def _written_letter(answer: str, options: Mapping[str, str]) -> Letter:
    if FAILED in answer:
        return NOTHING
    if any(words in answer for words in REFUSALS):
        return Letter("Z", "refused")
    words = answer.translate(AROUND).split()
    standing = [letter for letter in options if letter in words]
    if len(standing) == 1 and words.index(standing[0]) >= len(words) - NEAR_THE_END:
        return Letter(standing[0], "letter" if answer == standing[0] else "word")
    if not standing and "Z" in words:
        return Letter("Z", "refused")
    told = ANSWER_IS.search(answer)
    return Letter(told[1].upper(), "sentence") if told and told[1].upper() in options else NOTHING


def _quoted_option(answer: str, options: Mapping[str, str]) -> Letter:
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return NOTHING
    quoted = [letter for letter, text in options.items() if text.lower() in answer]
    return Letter(quoted[0], "text") if len(quoted) == 1 else NOTHING
