"""How sure a result is: bootstrap intervals, and whether two ways answer the same questions differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

RESAMPLES = 1000
SEED = 0
"""Of all draws, so that sets of the same questions are drawn alike and their differences are paired."""
LEVEL = 0.95
Numbers = Mapping[str, float]
Interval = list[float]
"""Its two ends."""


@dataclass(frozen=True)
class Scored:
    """Scores of a set of questions whose answers are known, in their order.

    Questions are drawn anew within their kind, as many as there are, so that a benchmark's mix of tasks stays what it
    is; those of one group (a picture of MME, the rotations of a question, copies of one in several kinds) are drawn
    together, within the groups that are of the same kinds.
    """

    kinds: Sequence[str]
    groups: Sequence[str]
    """Empty: the question is drawn alone."""
    scores: NDArray[np.float64]
    """[Q] in 0..1."""
    main: str = "accuracy"
    """The number that tables show; `accuracy` is the mean of the scores."""
    numbers: Callable[[Sequence[Sequence[int]]], Numbers] | None = None
    """Numbers over groups of questions, some of them several times; None: means of the scores, of all and by kind."""
    seen: Sequence[bool] | None = None
    """Which questions have an image; None: all."""

    @cached_property
    def units(self) -> list[list[int]]:
        """Questions that are drawn together."""
        found: dict[str | int, list[int]] = {}
        for number, group in enumerate(self.groups):
            found.setdefault(group or number, []).append(number)
        return list(found.values())

    @cached_property
    def values(self) -> Numbers:
        """The numbers of the set itself."""
        return self._numbers(np.arange(len(self.units)))

    @property
    def score(self) -> float | None:
        """The main number; None where it cannot be told."""
        return self.values.get(self.main)

    @cached_property
    def drawn(self) -> dict[str, NDArray[np.float64]]:
        """By name, [RESAMPLES] the numbers of as many sets drawn with replacement; NaN where one has no such number."""
        kinds: dict[frozenset[str], list[int]] = {}
        for unit, questions in enumerate(self.units):
            kinds.setdefault(frozenset(self.kinds[question] for question in questions), []).append(unit)
        strata, draw = [np.array(units) for units in kinds.values()], np.random.default_rng(SEED)
        found = {name: np.full(RESAMPLES, np.nan) for name in self.values}
        for row in range(RESAMPLES):
            units = np.concatenate([units[draw.integers(len(units), size=len(units))] for units in strata])
            for name, value in self._numbers(units).items():
                if name in found:
                    found[name][row] = value
        return found

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The middle 95 % of each number's draws (percentile bootstrap); of a set of one question there is none."""
        return {name: interval(drawn) for name, drawn in self.drawn.items()} if len(self.units) > 1 else {}

    @cached_property
    def _sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[K, U] of each kind and unit the sum of its scores, and its questions."""
        place = {kind: number for number, kind in enumerate(dict.fromkeys(self.kinds))}
        sums, sizes = np.zeros((2, len(place), len(self.units)))
        for unit, questions in enumerate(self.units):
            for question in questions:
                sums[place[self.kinds[question]], unit] += self.scores[question]
                sizes[place[self.kinds[question]], unit] += 1
        return sums, sizes

    def _numbers(self, units: NDArray[np.int64]) -> Numbers:
        if self.numbers is not None:
            return self.numbers([self.units[unit] for unit in units])
        sums, sizes = (part[:, units].sum(axis=1) for part in self._sums)
        named = {f"kinds.{k}": float(value) for k, value in zip(dict.fromkeys(self.kinds), sums / sizes, strict=True)}
        return {"accuracy": float(sums.sum() / sizes.sum()), **named}


def interval(drawn: NDArray[np.float64]) -> Interval:
    """The middle 95 % of draws."""
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


@dataclass(frozen=True)
class Difference:
    """Two ways on the same questions: the first one's main number less the second one's."""

    difference: float
    interval: Interval | None
    """Of paired draws."""
    p: float
    """Two-sided, of such a difference or a larger one where both are as good."""
    test: str
    """`mcnemar`: exact, on the questions that one of both has right; `bootstrap`: paired, for graded scores, for
    questions in groups, which are not independent, and for numbers other than the accuracy of all of them."""
    only_first: int
    """Questions that the first alone has right (a score of 1/2 or more)."""
    only_second: int


def compare(first: Scored, second: Scored) -> Difference | None:
    """Whether two ways differ on a set of questions; None where the main number cannot be told."""
    assert list(first.kinds) == list(second.kinds) and list(first.groups) == list(second.groups)
    if first.score is None or second.score is None:
        return None
    right, also = first.scores >= 0.5, second.scores >= 0.5
    only = int((right & ~also).sum()), int((also & ~right).sum())
    drawn = first.drawn[first.main] - second.drawn[second.main]
    plain = first.main == "accuracy" and all(len(unit) == 1 for unit in first.units)
    plain = plain and all(set(one.scores) <= {0.0, 1.0} for one in (first, second))
    return Difference(
        first.score - second.score,
        interval(drawn) if len(first.units) > 1 else None,
        mcnemar(*only) if plain else two_sided(drawn),
        "mcnemar" if plain else "bootstrap",
        *only,
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact p of so many questions that one alone has right, and the other alone (McNemar 1947): each is as likely one
    as the other where both are as good."""
    both = only_first + only_second
    return float(binomtest(only_first, both, 0.5).pvalue) if both else 1.0


def two_sided(drawn: NDArray[np.float64]) -> float:
    """p of no difference, by how many paired draws of one lie on the other side of 0; never less than what so many
    draws can tell (Davison and Hinkley 1997, 4.2)."""
    known = drawn[~np.isnan(drawn)]
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(known) + 1))
