"""Stage-1 output of images seen before, so that a frozen encoder reads each of them once."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Seen = tuple[Float[Tensor, "K D"], Bool[Tensor, " N"], Float[Tensor, " N"] | None]
"""One image: features of the kept patches, which patches these are, all scores."""


class PatchMemory:
    """Keeps what stage 1 left of up to `capacity` images, by name, in main memory; what comes later is not kept.

    Only for an encoder that is frozen and a stage 1 without chance, with the same settings for all who share it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._seen: dict[str, Seen] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def get(self, name: str) -> Seen | None:
        return self._seen.get(name)

    def put(self, name: str, seen: Seen) -> None:
        if len(self._seen) < self.capacity:
            features, kept, scores = seen
            self._seen[name] = features.cpu(), kept.cpu(), None if scores is None else scores.cpu()


def stack(rows: list[Seen], like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images side by side: features [I, N, D] (zeros where dropped), kept [I, N], scores [I, N], on `like`'s device."""
    kept = torch.stack([row[1] for row in rows]).to(like.device)
    flat = torch.cat([row[0] for row in rows]).to(like.device)
    features = flat.new_zeros((*kept.shape, flat.shape[-1]))
    features[kept] = flat
    scores = [row[2] for row in rows if row[2] is not None]
    return features, kept, torch.stack(scores).to(like.device) if scores else None
