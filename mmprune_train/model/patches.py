"""What stage 1 leaves of images."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """[I, N], None where stage 1 is off, and where the features come from the feature cache."""

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

    def take(self, images: list[int]) -> Patches:
        """Some of the images, in this order; of no image where there is none."""
        if images == list(range(len(self.kept))):
            return self
        chosen = self.chosen.split(self.kept.sum(1).tolist())
        return Patches(
            torch.cat([self.chosen[:0], *(chosen[image] for image in images)]),
            self.kept[images],
            self.order[images],
            None if self.scores is None else self.scores[images],
        )

    @property
    def indices(self) -> list[Tensor]:
        """Per image, the places that stay, ascending."""
        return list(self.kept.nonzero()[:, 1].split(self.kept.sum(1).tolist()))

    @property
    def entering(self) -> list[Tensor]:
        """Per image, the same in the order in which they enter the LLM."""
        return [row[:count] for row, count in zip(self.order, self.kept.sum(1).tolist(), strict=True)]

    def to(self, device: torch.device | str) -> Patches:
        """The features on another device; what counts and orders them stays where it is."""
        return replace(self, chosen=self.chosen.to(device))
