"""Cached features of the images of a data set, by path: what a training loader reads instead of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mmprune_train.features.shards import Shard
from mmprune_train.packed.patches import Patches


class ImageFeatures:
    """What stage 1 left of images, read from shards that are mapped into memory.

    Files are opened at first use, in each process that uses them, so loader workers may be forked or spawned.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        images: Mapping[Path, str],
        patches: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            images: path -> SHA-256 of the file, all of which are in the shards.
            patches: N, of an image.
            width: D, of a feature.
        """
        self.folder = folder
        self.names = [shard.name for shard in shards]
        self.patches = patches
        places: dict[str, tuple[int, int, int]] = {}
        for number, shard in enumerate(shards):
            first = 0
            for image, kept in zip(shard.images, shard.kept, strict=True):
                places[image] = (number, first, kept)
                first += kept
        self._places = {path: places[digest] for path, digest in images.items()}
        self._none = Patches(
            torch.empty((0, width), dtype=dtype),
            torch.empty((0, patches), dtype=torch.bool),
            torch.empty((0, patches), dtype=torch.long),
            None,
        )
        self._open: dict[int, Any] = {}

    def kept(self, image: Path) -> int:
        """Visual tokens of an image that stage 1 keeps; reads no features."""
        return self._places[image][2]

    def read(self, images: Sequence[Path]) -> Patches:
        """A row for each image; of no image where there is none. The features may still lie in the file."""
        rows = [self._read(image) for image in images]
        return rows[0] if len(rows) == 1 else Patches.cat([self._none, *rows])

    def _read(self, image: Path) -> Patches:
        number, first, count = self._places[image]
        if number not in self._open:
            self._open[number] = safe_open(self.folder / self.names[number], framework="pt")
        file = self._open[number]
        entering = file.get_slice("order")[first : first + count].long()
        kept = torch.zeros(self.patches, dtype=torch.bool)
        kept[entering] = True
        order = torch.full((1, self.patches), -1)
        order[0, :count] = entering
        return Patches(file.get_slice("chosen")[first : first + count], kept[None], order, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
