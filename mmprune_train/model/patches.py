"""What stage 1 leaves of images, and a memory of it, so that a frozen encoder reads each image once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass
class Patches:
    """Stage 1 of `I` images with `N` patches each, `K` tokens in all staying."""

    chosen: Float[Tensor, "K D"]
    """[K, D] features that enter the projector, image by image in raster order; what merging made is among them."""
    kept: Bool[Tensor, "I N"]
    """[I, N] their places; a made token has that of a dropped patch."""
    order: Int64[Tensor, "I N"]
    """[I, N] patches in the order in which they enter the LLM, those that stay out last."""
    scores: Float[Tensor, "I N"] | None
    """[I, N], None where stage 1 is off."""

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
        return self._each(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> Patches:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Patches:
        scores = None if self.scores is None else change(self.scores)
        return Patches(change(self.chosen), change(self.kept), change(self.order), scores)


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
