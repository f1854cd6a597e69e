"""Which samples form which global batch: a pure function of (seed, step), so a step is all a resume needs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np


@dataclass(eq=False)
class GlobalBatches:
    """The samples of every optimizer step: `size` of an endless row of epochs, each shuffled anew.

    Every epoch holds each sample once. A global batch that begins near the end of an epoch goes on into the next.
    """

    n: int
    """Samples."""
    size: int
    """Samples of a step, over all ranks."""
    seed: int
    modality: Sequence[Hashable] | None = None
    """A class for every sample; global batches hold one class, and what is left over of the classes is mixed, as is the
    batch in which an epoch ends. None: no grouping."""
    images: Sequence[Hashable] | None = None
    """What every sample looks at; with `samples_per_image` > 1, up to that many samples of one image follow each other,
    so that one pass of the vision tower may serve them all. None entries stay alone."""
    samples_per_image: int = 1

    def __post_init__(self) -> None:
        if self.samples_per_image == 1:
            self.images = None
        classes: dict[Hashable, list[int]] = {}
        for index in range(self.n):
            classes.setdefault(None if self.modality is None else self.modality[index], []).append(index)
        self._classes = [np.array(members) for members in classes.values()]
        self._latest: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, step: int) -> list[int]:
        """Samples of optimizer step `step`, from 0."""
        samples: list[int] = []
        while len(samples) < self.size:
            epoch, at = divmod(step * self.size + len(samples), self.n)
            samples += self.epoch(epoch)[at : at + self.size - len(samples)]
        return samples

    def epoch(self, epoch: int) -> list[int]:
        """All samples in the order of an epoch; do not change the list."""
        if self._latest[0] != epoch:
            self._latest = epoch, self._shuffled(epoch)
        return self._latest[1]

    def groups(self, samples: Sequence[int]) -> list[list[int]]:
        """Places in `samples` that had better stay together: neighbours of one image."""
        images = self.images
        if images is None:
            return [[place] for place in range(len(samples))]
        keys = [(images[index], place if images[index] is None else None) for place, index in enumerate(samples)]
        neighbours = [list(group) for _, group in groupby(range(len(samples)), keys.__getitem__)]
        return _chunks(neighbours, self.samples_per_image)

    def _shuffled(self, epoch: int) -> list[int]:
        """An epoch as [end of a global batch that the epoch before began] + whole ones + [beginning of another]."""
        random = np.random.default_rng([self.seed, epoch])
        head = min(-epoch * self.n % self.size, self.n)
        tail = (self.n - head) % self.size
        whole: list[list[int]] = []
        left: list[int] = []
        for members in self._classes:
            order = self._together(random.permutation(members).tolist(), random)
            full = len(order) // self.size * self.size
            whole += [order[at : at + self.size] for at in range(0, full, self.size)]
            left += order[full:]
        while len(left) < head + tail:
            left += whole.pop(int(random.integers(len(whole))))
        whole += [left[at : at + self.size] for at in range(head, len(left) - tail, self.size)]
        middle = [index for batch in random.permutation(len(whole)).tolist() for index in whole[batch]]
        return left[:head] + middle + left[len(left) - tail :]

    def _together(self, order: list[int], random: np.random.Generator) -> list[int]:
        if self.images is None:
            return order
        groups: dict[Hashable, list[int]] = {}
        for index in order:
            image = self.images[index]
            groups.setdefault((image, index if image is None else None), []).append(index)
        chunks = _chunks(list(groups.values()), self.samples_per_image)
        return [index for chunk in random.permutation(len(chunks)).tolist() for index in chunks[chunk]]


def _chunks(groups: list[list[int]], most: int) -> list[list[int]]:
    return [group[at : at + most] for group in groups for at in range(0, len(group), most)]
