"""The numbers of a result.json by name, and which results no other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mmprune_train.errors import UserError, nearest

ASKED = ("evaluated_with", "asked", "data")
"""Parts of a result, wherever they stand, that say what was asked, not what was found."""
FIRST = "evaluate."
"""Numbers that a short name means first: what a trained model reaches, not what was seen while it trained."""


def numbers(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Dotted key -> value of every finite number in a result; lists and words are left out."""
    found: dict[str, float] = {}
    for key, value in result.items():
        if key in ASKED:
            continue
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{prefix}{key}"] = value
    return found


def pick(found: Mapping[str, float], name: str) -> float:
    """The number that `name` means: a dotted key, its end, or a group of numbers, whose mean it is.

    Raises UserError where there is none, or several of which none comes first.
    """
    meant: dict[str, list[float]] = {}
    for key, value in found.items():
        for candidate in (key, key.rpartition(".")[0]):
            if candidate == name or candidate.endswith(f".{name}"):
                meant.setdefault(candidate, []).append(value)
    if name in meant:
        return fmean(meant[name])
    first = {key: values for key, values in meant.items() if key.startswith(FIRST)} or meant
    if len(first) > 1:
        raise UserError(f"{name} may be {' or '.join(first)}: write which")
    if not first:
        remedy = "; evaluate.after_train=true adds what the trained model reaches" if "accuracy" in name else ""
        words = [*found, *(word for key in found for word in key.split("."))]
        raise UserError(
            f"{name}: the result has no such number{nearest(name, words)}{remedy} (it has {_listed(found)})"
        )
    return fmean(next(iter(first.values())))


def _listed(found: Mapping[str, float]) -> str:
    """`evaluate: questions, keep_ratio; evaluate.accuracy: open`."""
    groups: dict[str, list[str]] = {}
    for key in found:
        group, _, name = key.rpartition(".")
        groups.setdefault(group, []).append(name)
    told = [f"{group}: {', '.join(names)}" if group else ", ".join(names) for group, names in groups.items()]
    return "; ".join(told) or "no number at all"


def front(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Indices of the Pareto front: points that no other equals or beats in everything and beats in something.

    Args:
        points: one row of objectives a result.
        directions: `maximize` or `minimize` for each objective.
    """
    signs = [1 if direction == "maximize" else -1 for direction in directions]
    scores = [[sign * value for sign, value in zip(signs, point, strict=True)] for point in points]
    usable = [i for i, score in enumerate(scores) if not any(map(math.isnan, score))]

    def beats(a: list[float], b: list[float]) -> bool:
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    return [i for i in usable if not any(beats(scores[j], scores[i]) for j in usable)]
