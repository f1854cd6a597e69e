"""A tiny model with a feature cache, which counts the images that it encodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import SIDE, packed, tiny_llava

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.features.fill import Report, fill
from mmprune_train.features.settings import feature_settings
from mmprune_train.features.store import ImageFeatures
from mmprune_train.model.llava import PackedLlava
from mmprune_train.packed.patches import Patches

ENCODER = EncoderConfig(name="tiny", image_size=SIDE, patch_size=8)
READER = ImageReader(image_processor(ENCODER, "square"))


class Counted:
    """A tiny model that counts the images it encodes."""

    def __init__(self, pruner: object = "twostage", vision: str = "clip") -> None:
        self.model = packed(tiny_llava(vision), pruner, vision_chunk=2).requires_grad_(False)
        self.images = 0
        encode = self.model.encode_images

        def counting(pixels: torch.Tensor) -> Any:
            self.images += len(pixels)
            return encode(pixels)

        self.model.encode_images = counting

    def fill(self, root: Path, images: dict[Path, str], **more: Any) -> tuple[ImageFeatures, Report]:
        dtype = torch.float32
        settings = feature_settings(self.model, READER.processor.to_dict(), dtype)
        more = {"shard_bytes": 1500, **more}  # a few images of a few hundred bytes
        return fill(self.model, settings, "tiny", root, images, READER, dtype, torch.device("cpu"), **more)


def assert_same(found: Patches, expected: Patches) -> None:
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=0, atol=1e-6)
    assert torch.equal(found.kept, expected.kept)
    for a, b in zip(found.entering, expected.entering, strict=True):
        assert a.tolist() == b.tolist()
    assert torch.equal(found.order.sort(1).values, expected.order.sort(1).values), "every patch has its place"


def encoded(model: PackedLlava, paths: list[Path]) -> Patches:
    """All images in one pass, without the cache."""
    return PackedLlava.select_patches(model, torch.stack([READER(path) for path in paths]))


def flip_a_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-30] ^= 1
    shard.write_bytes(bytes(data))
