"""Fill the feature cache: encode what it does not hold yet, and hand back all that was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from mmprune_train.data.images import ImageReader
from mmprune_train.errors import UserError
from mmprune_train.features.content import image_digests
from mmprune_train.features.settings import folder_name
from mmprune_train.features.shards import (
    SETTINGS,
    SHARD_BYTES,
    Shard,
    ShardWriter,
    is_whole,
    read_lists,
    remove,
    remove_leftovers,
)
from mmprune_train.features.store import ImageFeatures
from mmprune_train.model.images import ImageSide
from mmprune_train.packed.patches import Patches
from mmprune_train.progress import progress
from mmprune_train.storage.assets import say
from mmprune_train.storage.files import write_json
from mmprune_train.workers import ALONE, Ranks, read_by_workers


@dataclass(frozen=True)
class Report:
    """What filling did, and what the folder then holds."""

    folder: str
    images: int
    bytes: int
    """Of all shards."""
    dense_bytes: int
    """Of all patches of the same images, in the same type."""
    encoded: int
    """Images that were not there before."""
    seconds: float
    """From the first look at the files to the last shard."""

    @property
    def ratio(self) -> float:
        """Dense bytes / bytes; 1 where there are no images."""
        return self.dense_bytes / self.bytes if self.bytes else 1.0

    @property
    def images_per_second(self) -> float:
        """Images encoded a second."""
        return self.encoded / self.seconds if self.seconds else 0.0

    def numbers(self) -> dict[str, Any]:
        """For a result.json."""
        return {**self.__dict__, "ratio": self.ratio, "images_per_second": self.images_per_second}

    def line(self) -> str:
        """For people."""
        new = f"{self.encoded:,} encoded in {self.seconds:.1f} s, {self.images_per_second:.1f} images/s"
        return (
            f"{self.images:,} images, {self.bytes / 1e6:,.1f} MB (dense {self.dense_bytes / 1e6:,.1f} MB, "
            f"{self.ratio:.1f} times as much); {new if self.encoded else 'none to encode'}"
        )


def fill(
    model: ImageSide,
    settings: Mapping[str, object],
    name: str,
    root: Path,
    images: Mapping[Path, str],
    reader: ImageReader,
    dtype: torch.dtype,
    device: torch.device,
    num_workers: int = 0,
    ranks: Ranks = ALONE,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[ImageFeatures, Report]:
    """Every image's features, those that were missing encoded and written first.

    Every shard is read and compared with its checksum beforehand; a damaged one is deleted and its images are encoded
    again, with a line that says so.

    Args:
        model: its frozen encoder makes the features; `execution.vision_chunk` images at a time.
        settings: of these features, from `feature_settings`.
        name: of the encoder, for people.
        root: the cache's folder, shared by all ranks.
        images: path -> who asks for it, for errors.
        reader: path -> pixels.
        dtype: bfloat16 computes under autocast; features are stored in it.
        num_workers: processes that read images.
    Raises:
        UserError: an image is missing or broken, or its features are not finite, or the folder cannot be written or is
            not shared.
    """
    began = time.perf_counter()
    folder = root / folder_name(name, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.rank == 0 and not (folder / SETTINGS).is_file():
            write_json(folder / SETTINGS, settings, shared=True)
    except OSError as error:
        raise UserError(f"trainer.feature_cache_dir: cannot write to {root} ({error}); name another folder") from error
    digests = image_digests(images, root, ranks)
    shards = whole_shards(folder, ranks)
    held = {image for shard in shards for image in shard.images}
    missing: dict[str, Path] = {}
    for path, digest in digests.items():
        if digest not in held:
            missing.setdefault(digest, path)

    def encode(share: Sequence[str]) -> list[Shard]:
        title = f"features (1 of {ranks.world} processes)" if ranks.world > 1 else "features"
        items = [(digest, missing[digest]) for digest in share]
        indices = BatchSampler(range(len(items)), size, drop_last=False)
        chunks = read_by_workers(partial(_chunk, items, images, reader), indices, num_workers)
        if ranks.rank == 0:
            chunks = progress(chunks, title, total=-(-len(share) // size))
        with closing(ShardWriter(folder, shard_bytes)) as writer, encoder_of(model, dtype, device) as encoder:
            for names, pixels in chunks:
                patches = encoder(pixels)
                refuse_broken(patches, [missing[name] for name in names])
                writer.add(names, patches)
        return writer.written

    size, patches = model.execution.vision_chunk, model.config.image_seq_length
    if missing:
        written = ranks.each(lambda: encode(ranks.share(list(missing))))
        shards += [shard for found in written for shard in found]
    ranks.each(lambda: _see_all(folder, shards))
    width = model.hf.model.multi_modal_projector.linear_1.in_features
    held |= set(missing)
    report = Report(
        str(folder),
        images=len(held),
        bytes=sum(shard.bytes for shard in shards),
        dense_bytes=len(held) * patches * width * dtype.itemsize,
        encoded=len(missing),
        seconds=time.perf_counter() - began,
    )
    return ImageFeatures(folder, shards, digests, patches, width, dtype), report


def refuse_broken(patches: Patches, paths: Sequence[Path]) -> None:
    """Raise UserError where the features of one of these images are not finite."""
    finite = patches.chosen.isfinite().all(1)
    if not bool(finite.all()):
        row = int(finite.int().argmin())
        image = int((patches.kept.sum(1).cumsum(0) <= row).sum())
        raise UserError(
            f"feature cache: the encoder's features of {paths[image]} are NaN or infinite and are not kept; look at "
            "encoder.image_mean, encoder.image_std and the encoder's weights, or use trainer.precision=fp32"
        )


def _see_all(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise UserError where this process does not find what the others have written."""
    for shard in shards:
        if not (folder / shard.name).is_file():
            raise UserError(
                f"feature cache: {folder / shard.name}, written by one process, is not there for another; set "
                "trainer.feature_cache_dir to a folder that all nodes share"
            )


def whole_shards(folder: Path, ranks: Ranks) -> list[Shard]:
    """The shards of a folder that are whole, the ranks sharing the reading; the others are deleted."""

    def look() -> list[Shard]:
        remove_leftovers(folder)
        shards, broken = read_lists(folder)
        for path in broken:
            say(f"feature cache: {path} is damaged; the images of its shard are encoded again")
            remove(folder, path.name)
        return shards

    def check(share: Sequence[Shard]) -> list[bool]:
        with ThreadPoolExecutor(4) as pool:
            whole = list(pool.map(lambda shard: is_whole(folder, shard), share))
        for shard in (shard for shard, good in zip(share, whole, strict=True) if not good):
            say(f"feature cache: {folder / shard.name} is damaged; its {len(shard.images)} images are encoded again")
            remove(folder, shard.name)
        return whole

    shards = ranks.each(lambda: look() if ranks.rank == 0 else [])[0]
    return [shard for shard, good in zip(shards, ranks.all(check, shards), strict=True) if good]


@contextmanager
def encoder_of(model: ImageSide, dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[Tensor], Patches]]:
    """Pixels [I, 3, H, W] -> what stage 1 keeps of them in `dtype`; what runs for it is on `device` meanwhile."""
    inner = model.hf.model
    parts = [inner.vision_tower, *([inner.multi_modal_projector] if model.pruner.projects else [])]
    parts += [] if model.scorer is None else [model.scorer]
    places = [next(part.parameters()).device for part in parts]

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Patches:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            patches = model.select_patches(pixels.to(device))
        return replace(patches, chosen=patches.chosen.to(dtype))

    try:
        for part in parts:
            part.to(device)
        yield encode
    finally:
        for part, place in zip(parts, places, strict=True):
            part.to(place)


def _chunk(
    items: Sequence[tuple[str, Path]], askers: Mapping[Path, str], reader: ImageReader, indices: Sequence[int]
) -> tuple[list[str], Tensor]:
    """Digests and pixels [I, 3, H, W] of some of the images."""
    digests, paths = zip(*(items[index] for index in indices), strict=True)
    return list(digests), torch.stack([reader(path, askers[path]) for path in paths])
