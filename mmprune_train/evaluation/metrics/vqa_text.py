"""Answers made alike before they are compared, as VQA's own scorer and EvalAI's do it.

Slips of theirs included: a full stop goes unless a digit follows it, and at most 32 of them go; an apostrophe is put
back into a contraction; a number word up to ten becomes a digit, and so does `none`.
"""

from __future__ import annotations

import re

MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation that goes."""
STOP = re.compile(r"\.(?!\d)")
MOST_STOPS = 32
"""Full stops that go: the scorers pass a flag of that value where a count is read."""
COMMA = re.compile(r"\d,\d")
COMMAS = re.compile(r"(?<=\d),+(?=\d)")
ARTICLES = frozenset({"a", "an", "the"})
_COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}

_WRITTEN = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_IRREGULAR = {"somebody'd": "somebodyd", "'ow'sat": "'ow's'at", "'ows'at": "'ow's'at", "ow's'at": "'ow's'at"}


def _misspelt(word: str) -> list[str]:
    """A contraction without one of its apostrophes, for each that it has."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: right for right in _WRITTEN.split() for wrong in _misspelt(right)} | _IRREGULAR
"""Without an apostrophe -> with it. Text is in lower case when they are looked up: those with an I never apply."""


def vqa_normalised(answer: str) -> str:
    """As `vqaEval.py` of GT-Vision-Lab/VQA leaves an answer whose annotators disagree."""
    return _words(_without_marks(trimmed(answer), COMMA))


def evalai_normalised(answer: str) -> str:
    """As mmf's `EvalAIAnswerProcessor`, which LLaVA (TextVQA, submissions) and lmms-eval (TextVQA, VizWiz) have."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_without_marks(trimmed(answer), COMMAS))


def trimmed(answer: str) -> str:
    """On one line, without spaces at its ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str, comma: re.Pattern[str]) -> str:
    """Marks at a word's edge vanish, others become a space; where a comma stands between digits all vanish."""
    numeric, left = comma.search(text) is not None, text
    for mark in MARKS:
        vanishes = numeric or f"{mark} " in text or f" {mark}" in text
        left = left.replace(mark, "" if vanishes else " ")
    return STOP.sub("", left, count=MOST_STOPS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
