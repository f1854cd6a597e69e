"""Visual tokens kept by vision-side pruning."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.packed.host import upload


@dataclass
class Patches:
    """Stage 1 of `I` images with `N` patches each, `K` tokens in all staying."""

    chosen: Float[Tensor, "K D"]
    """[K, D] features that enter the projector, image by image in raster order; what merging made is among them. Where
    stage 1 merges behind the projector, what enters the LLM."""
    kept: Bool[Tensor, "I N"]
    """[I, N] their places, on the host; a made token has that of a dropped patch."""
    order: Int64[Tensor, "I N"]
    """[I, N] patches in the order in which they enter the LLM, and -1 behind the last; on the host."""
    scores: Float[Tensor, "I N"] | None
    """[I, N], None where stage 1 is off, and where the features come from the feature cache."""
    gates: Float[Tensor, " K"] | None = None
    """[K] 1 each, with a gradient where the scores are trained; None: they are not."""
    excess: Float[Tensor, " I"] | None = None
    """[I] share of each image's patches that a score which is trained keeps beyond its target; None: it has none."""

    @classmethod
    def whole(cls, features: Float[Tensor, "I N D"]) -> Patches:
        """All of them: stage 1 is off."""
        images, size = features.shape[:2]
        order = torch.arange(size).expand(images, size)
        return cls(features.flatten(0, 1), torch.ones((images, size), dtype=torch.bool), order, None)

    @classmethod
    def cut(
        cls,
        features: Float[Tensor, "I N D"],
        order: Int64[Tensor, "I N"],
        scores: Float[Tensor, "I N"] | None,
        gates: Float[Tensor, "I N"] | None = None,
    ) -> Patches:
        """Of dense features, those of the patches in `order`.

        Args:
            gates: of all patches.
        """
        images, size = order.shape
        kept = torch.zeros((images, size + 1), dtype=torch.bool)
        kept = kept.scatter(1, torch.where(order < 0, size, order), True)[:, :size]
        image, patch = (upload(index, features.device) for index in kept.nonzero().unbind(1))
        return cls(features[image, patch], kept, order, scores, None if gates is None else gates[image, patch])

    @classmethod
    def cat(cls, parts: list[Patches]) -> Patches:
        """The images of all parts, one after the other."""
        scores = [part.scores for part in parts if part.scores is not None]
        gates = [part.gates for part in parts if part.gates is not None]
        excess = [part.excess for part in parts if part.excess is not None]
        return cls(
            torch.cat([part.chosen for part in parts]),
            torch.cat([part.kept for part in parts]),
            torch.cat([part.order for part in parts]),
            torch.cat(scores) if scores else None,
            torch.cat(gates) if gates else None,
            torch.cat(excess) if excess else None,
        )

    def take(self, images: list[int]) -> Patches:
        """Some of the images, in this order; of no image where there is none."""
        if images == list(range(len(self.kept))):
            return self
        counts = self.kept.sum(1).tolist()
        chosen, gates = self.chosen.split(counts), None if self.gates is None else self.gates.split(counts)
        return Patches(
            torch.cat([self.chosen[:0], *(chosen[image] for image in images)]),
            self.kept[images],
            self.order[images],
            None if self.scores is None else self.scores[images],
            None if gates is None else torch.cat([gates[image] for image in images]),
            None if self.excess is None else self.excess[images],
        )

    def gated(self, tokens: Float[Tensor, "K E"]) -> Float[Tensor, "K E"]:
        """What the projector makes of `chosen`, as it is; a gate's gradient is that of how much of what tells its token
        from the mean of its image's tokens goes on."""
        if self.gates is None:
            return tokens
        image = upload(self.kept.nonzero()[:, 0], tokens.device)
        with torch.no_grad():
            states = tokens.float()
            total = states.new_zeros((len(self.kept), states.shape[1])).index_add(0, image, states)
            own = states - (total / upload(self.kept.sum(1), tokens.device)[:, None])[image]
        return tokens + ((self.gates - 1)[:, None] * own).to(tokens.dtype)

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
