"""How a global batch is split into the micro-batches of all ranks: evenly, or to a number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

from mmprune_train.data.lengths import Estimate, KeptTokens, Length, SampleLengths
from mmprune_train.data.sampler import GlobalBatches
from mmprune_train.errors import UserError

Split = Callable[[int], list[list[int]]]
"""Optimizer step -> samples of each of its micro-batches: those of all ranks at once, then the next ones."""


@dataclass
class EvenSplit:
    """`batch_size` samples for every rank and micro-batch."""

    batches: GlobalBatches
    batch_size: int

    def __call__(self, step: int) -> list[list[int]]:
        samples = self.batches[step]
        return [samples[at : at + self.batch_size] for at in range(0, len(samples), self.batch_size)]


@dataclass
class TokenSplit:
    """As few micro-batches as hold the step's samples within a budget of tokens, equally many on every rank."""

    batches: GlobalBatches
    """Their size is a multiple of `world`."""
    lengths: SampleLengths
    budget: int
    """Tokens that enter the LLM, a rank and micro-batch."""
    world: int
    kept: KeptTokens | None = None
    """Estimates what `lengths` does not know; None: it knows all."""

    def __post_init__(self) -> None:
        assert self.batches.size % self.world == 0, "else a sample a rank may be too much and one rank have none"

    def __call__(self, step: int) -> list[list[int]]:
        samples = self.batches[step]
        lengths = [self._checked(index) for index in samples]
        estimate = self.kept.at(step) if self.kept is not None else Estimate(0.0, 0.0, 0)
        bins = pack(self.batches.groups(samples), lengths, estimate, self.budget, self.world)
        return [[samples[place] for place in places] for places in bins]

    def check(self) -> None:
        """Read the lengths of all samples. Raises UserError for one that no micro-batch can hold."""
        for index in range(len(self.lengths)):
            self._checked(index)

    def _checked(self, index: int) -> Length:
        length = self.lengths[index]
        if length.known > self.budget:
            record = self.lengths.dataset.records[index]
            text = " of text alone" if length.images else ""
            raise UserError(
                f"{record.told}: its {length.known} tokens{text} exceed the stage's token_budget="
                f"{self.budget}; raise that to {length.known} or more, lower max_length, or drop the sample"
            )
        return length


def pack(
    groups: Sequence[Sequence[int]], lengths: Sequence[Length], estimate: Estimate, budget: int, world: int
) -> list[list[int]]:
    """Share out samples over world x k micro-batches, with the smallest k for which all stay within the budget.

    Longest first, each to the micro-batch that has the least (LPT; Graham 1969), so loads are even; those that run at
    the same time on different ranks have neighbouring loads. A sample that is too long by itself gets one alone.

    Args:
        groups: places in `lengths`; a group stays together where it fits and the same k allows it.
        lengths: of the samples, a multiple of `world` of them.
    Returns:
        Places in each micro-batch, ascending; those of all ranks, then the next ones. None is empty.
    """
    singles = [[place] for group in groups for place in group]
    together: list[Sequence[int]] = []
    for group in groups:
        fits = estimate.safe(_sum(lengths, group)) <= budget
        together += [group] if fits else [[place] for place in group]
    total = sum(map(estimate.expected, lengths))
    most = len(lengths) // world
    for k in range(min(most, max(1, math.ceil(total / (budget * world)))), most + 1):
        for parts in (together, singles):
            bins = _least_loaded(parts, lengths, estimate, world * k)
            if bins and all(load <= budget or len(places) == 1 for load, places in bins):
                rows = [bins[at : at + world] for at in range(0, len(bins), world)]
                # every other row turned round: no rank always has the larger share
                rows = [row[::-1] if number % 2 else row for number, row in enumerate(rows)]
                return [sorted(places) for row in rows for _, places in row]
    raise AssertionError("one sample a micro-batch is always possible")


def _least_loaded(
    groups: Sequence[Sequence[int]], lengths: Sequence[Length], estimate: Estimate, count: int
) -> list[tuple[float, list[int]]]:
    """`count` bins with their loads, the fullest first; none where there are fewer groups than bins."""
    if len(groups) < count:
        return []
    sums = [_sum(lengths, group) for group in groups]
    inside = [Length(0)] * count
    places: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, number) for number in range(count)]
    heapify(heap)
    for item in sorted(range(len(groups)), key=lambda item: (-estimate.safe(sums[item]), groups[item][0])):
        number = heap[0][1]
        inside[number] += sums[item]
        places[number] += groups[item]
        heapreplace(heap, (estimate.safe(inside[number]), number))
    return [(load, places[number]) for load, number in sorted(heap, key=lambda pair: (-pair[0], pair[1]))]


def _sum(lengths: Sequence[Length], group: Sequence[int]) -> Length:
    """Of samples that look at the same: what is uncertain of one is so of all."""
    whole = sum((lengths[place] for place in group), Length(0))
    return replace(whole, variance=whole.variance * len(group))
