"""Which samples form which batch: a pure function of (seed, epoch), so that a position is all a resume needs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from mmprune_train.errors import UserError


class ResumableBatches:
    """Batches of sample indices for one rank of several, the same number on every rank.

    Every epoch is shuffled anew. What does not fill a last global batch is left out of that epoch; another epoch leaves
    out others.

    Args:
        n: samples.
        batch_size: samples a batch and rank.
        modality: a class for every sample; batches hold one class (over all ranks), and what is left over of the
            classes is mixed, so that nothing is lost that would otherwise be trained on. None: no grouping.
        images: what every sample looks at; with `samples_per_image` > 1, up to that many samples of one image stay
            together, so that one pass of the vision tower serves them all. None entries stay alone.
    Raises:
        UserError: there are fewer samples than one global batch.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        modality: Sequence[Hashable] | None = None,
        images: Sequence[Hashable] | None = None,
        samples_per_image: int = 1,
    ) -> None:
        if n < batch_size * world:
            raise UserError(
                f"{n} samples do not fill one batch of batch_size={batch_size} on {world} device(s); "
                "lower the stage's batch_size or raise the split's limit"
            )
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.samples_per_image = samples_per_image
        self._images = images if samples_per_image > 1 else None
        classes: dict[Hashable, list[int]] = {}
        for index in range(n):
            classes.setdefault(modality[index] if modality is not None else None, []).append(index)
        self._classes = [np.array(members) for members in classes.values()]

    def __len__(self) -> int:
        """Batches an epoch, on every rank."""
        return self.n // (self.batch_size * self.world)

    def epoch(self, epoch: int, start: int = 0) -> list[list[int]]:
        """The batches `start`, `start + 1`, ... of an epoch on this rank."""
        random = np.random.default_rng([self.seed, epoch])
        size = self.batch_size * self.world
        whole: list[list[int]] = []
        left: list[int] = []
        for members in self._classes:
            order = self._together(random.permutation(members).tolist(), random)
            full = len(order) // size * size
            whole += [order[at : at + size] for at in range(0, full, size)]
            left += order[full:]
        whole += [left[at : at + size] for at in range(0, len(left) // size * size, size)]
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [whole[batch][mine] for batch in random.permutation(len(whole)).tolist()[start:]]

    def _together(self, order: list[int], random: np.random.Generator) -> list[int]:
        if self._images is None:
            return order
        groups: dict[Hashable, list[int]] = {}
        for index in order:
            image = self._images[index]
            groups.setdefault(("alone", index) if image is None else ("image", image), []).append(index)
        step = self.samples_per_image
        chunks = [group[at : at + step] for group in groups.values() for at in range(0, len(group), step)]
        return [index for chunk in random.permutation(len(chunks)).tolist() for index in chunks[chunk]]
