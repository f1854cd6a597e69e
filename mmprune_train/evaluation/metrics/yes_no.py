"""A yes or a no read out of an answer, in the ways that published numbers were read."""

from __future__ import annotations

LOOKED_AT = 4
"""Characters of an answer that MME's tool looks at."""


def first_sentence(answer: str) -> str:
    """`no` where the first sentence has the word No, no or not, else `yes`: POPE's `evaluate.py` and LLaVA's
    `eval_pope.py`. So `NO` and an empty answer are a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def bare(answer: str) -> str:
    """The whole answer in lower case, as lmms-eval's POPE compares it: `yes.` is no yes there."""
    return answer.lower().strip()


def first_characters(answer: str) -> str:
    """`yes`, `no` or `other` by the first four characters, as the evaluation tool of MME: `Know` is a no."""
    start = answer.lower()[:LOOKED_AT]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
