"""What stage 1 leaves of images, and a memory of it, so that a frozen encoder reads each image once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.pruning.host import upload


@dataclass
class Patches:
    """Stage 1 of `I` images with `N` patches each, `K` tokens in all staying."""

    chosen: Float[Tensor, "K D"]
    """[K, D] features that enter the projector, image by image in raster order; what merging made is among them."""
    kept: Bool[Tensor, "I N"]
    """[I, N] their places, on the host; a made token has that of a dropped patch."""
    order: Int64[Tensor, "I N"]
    """[I, N] patches in the order in which they enter the LLM, and -1 behind the last; on the host."""
    scores: Float[Tensor, "I N"] | None
    """[I, N], None where stage 1 is off."""

    @classmethod
    def whole(cls, features: Float[Tensor, "I N D"]) -> Patches:
        """All of them: stage 1 is off."""
        images, size = features.shape[:2]
        order = torch.arange(size).expand(images, size)
        return cls(features.flatten(0, 1), torch.ones((images, size), dtype=torch.bool), order, None)

    @classmethod
    def cut(
        cls, features: Float[Tensor, "I N D"], order: Int64[Tensor, "I N"], scores: Float[Tensor, "I N"] | None
    ) -> Patches:
        """Of dense features, those of the patches in `order`."""
        images, size = order.shape
        kept = torch.zeros((images, size + 1), dtype=torch.bool)
        kept = kept.scatter(1, torch.where(order < 0, size, order), True)[:, :size]
        image, patch = (upload(index, features.device) for index in kept.nonzero().unbind(1))
        return cls(features[image, patch], kept, order, scores)

    @classmethod
    def cat(cls, parts: list[Patches]) -> Patches:
        """The images of all parts, one after the other."""
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            torch.cat([part.chosen for part in parts]),
            torch.cat([part.kept for part in parts]),
            torch.cat([part.order for part in parts]),
            torch.cat(scores) if scores else None,
        )

    @property
    def indices(self) -> list[Tensor]:
        """Per image, the places that stay, ascending."""
        return list(self.kept.nonzero()[:, 1].split(self.kept.sum(1).tolist()))

    @property
    def entering(self) -> list[Tensor]:
        """Per image, the same in the order in which they enter the LLM."""
        return [row[:count] for row, count in zip(self.order, self.kept.sum(1).tolist(), strict=True)]

    def detach(self) -> Patches:
        """The same without gradient."""
        return replace(self, chosen=self.chosen.detach())

    def to(self, device: torch.device | str) -> Patches:
        """The same with features and scores on another device."""
        scores = None if self.scores is None else self.scores.to(device)
        return replace(self, chosen=self.chosen.to(device), scores=scores)


class PatchMemory:
    """Keeps what stage 1 left of up to `capacity` images, by name, in main memory; what comes later is not kept.

    Only for an encoder that is frozen and a stage 1 without chance, with the same settings for all who share it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._seen: dict[str, Patches] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def get(self, name: str) -> Patches | None:
        return self._seen.get(name)

    def put(self, name: str, seen: Patches) -> None:
        """Remember one image."""
        if len(self._seen) < self.capacity:
            self._seen[name] = seen.to("cpu")
