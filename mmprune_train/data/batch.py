"""Examples of one batch as one packed sequence, each image stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmprune_train.data.encode import Example
from mmprune_train.packed.patches import Patches
from mmprune_train.packed.sequence import IGNORE, Kind, PackedSequence


@dataclass(frozen=True)
class Sample:
    """An example with its images, in order: their pixels, or what the feature cache holds of them."""

    example: Example
    images: list[Path]
    pixels: list[Tensor]
    """One [3, H, W] float32 an image; empty where `patches` are given."""
    patches: Patches | None = None
    """A row for each image, none for a text-only sample; None: the feature cache is off."""


def without_pixels(example: Example, images: Sequence[Path]) -> Sample:
    """A sample of the images that its example still shows, none of them read."""
    paths = list(images)[: example.n_images]
    return Sample(example, paths, [torch.empty(0)] * len(paths))


class Place(NamedTuple):
    """Where a micro-batch stands: `number` of the `of` micro-batches of optimizer step `step`, both from 0."""

    step: int = 0
    number: int = 0
    of: int = 1
    supervised: int = 0
    """Tokens that count in the loss, over the step's micro-batches on this rank."""
    images: int = 0
    """Most images that one of them has to encode."""

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.of - 1


ALONE = Place()


@dataclass
class Batch:
    sequence: PackedSequence
    pixel_values: Tensor | None
    """[I, 3, H, W] float32; None: text only, or `patches` take their place."""
    ids: list[str]
    """Names of the samples."""
    images: list[str]
    """Paths of the images, row by row of `pixel_values` or `patches`."""
    supervised: int
    """Tokens that count in the loss."""
    patches: Patches | None = None
    """With the feature cache, what stage 1 left of the images; of none in a batch of text alone."""
    truncated: tuple[int, int] = (0, 0)
    """Samples that were cut to the maximum length, and tokens that they lost."""
    place: Place = ALONE
    """Set by who knows the optimizer step."""

    @property
    def encoded(self) -> int:
        """Images that the vision tower has to read."""
        return 0 if self.pixel_values is None else len(self.pixel_values)

    def to(self, device: torch.device | str) -> Batch:
        """The pixels on another device; the sequence stays on the host."""
        return self._moved(lambda pixels: pixels.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        pixels = None if self.pixel_values is None else move(self.pixel_values)
        patches = self.patches and replace(self.patches, chosen=move(self.patches.chosen))
        return replace(self, pixel_values=pixels, patches=patches)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack samples one after the other. Positions restart at 0 in each; targets are labels shifted inside each.

    Samples that name the same image path share one row of `pixel_values`, or of `patches`.
    """
    examples = [sample.example for sample in samples]
    rows: dict[Path, int] = {}
    pixels: list[Tensor] = []
    patches: list[Patches] = []
    for sample in samples:
        new = []
        for number, path in enumerate(sample.images):
            if path not in rows:
                rows[path] = len(rows)
                new.append(number)
        if sample.patches is not None:
            patches.append(sample.patches.take(new))
        else:
            pixels += [sample.pixels[number] for number in new]
    target = torch.cat([pad(example.labels[1:], (0, 1), value=IGNORE) for example in examples])
    places = [_image_and_patch(sample, rows) for sample in samples]
    kind = torch.cat([example.kind for example in examples])
    sequence = PackedSequence(
        ids=torch.cat([example.ids for example in examples]),
        position=torch.cat([torch.arange(len(example.ids)) for example in examples]),
        segment=torch.repeat_interleave(torch.tensor([len(example.ids) for example in examples])),
        kind=kind,
        image=torch.cat([image for image, _ in places]),
        patch=torch.cat([patch for _, patch in places]),
        turn=torch.cat([example.turn for example in examples]),
        target=target,
        slot=torch.arange(len(kind)),
        samples=len(samples),
    )
    return Batch(
        sequence=sequence,
        pixel_values=torch.stack(pixels) if pixels else None,
        ids=[example.id for example in examples],
        images=[str(path) for path in rows],
        supervised=int((target != IGNORE).sum()),
        patches=Patches.cat(patches) if patches else None,
        truncated=(sum(example.truncated > 0 for example in examples), sum(example.truncated for example in examples)),
    )


def _image_and_patch(sample: Sample, rows: dict[Path, int]) -> tuple[Tensor, Tensor]:
    """For each token the row of its image and its place in it, -1 elsewhere; both [L]."""
    visual = sample.example.kind == Kind.VISUAL
    image, patch = torch.full((2, len(visual)), -1)
    if sample.images:
        order = torch.arange(int(visual.sum()))
        per_image = len(order) // len(sample.images)
        row = torch.tensor([rows[path] for path in sample.images])
        image[visual], patch[visual] = row[order // per_image], order % per_image
    return image, patch
