"""The files of the feature cache: safetensors shards that are whole or not there, each beside a list of its images.

`ID.safetensors` holds `chosen` [K, D] and `order` [K] (int16, or int32 where an image has more patches) of its images,
one after the other; `ID.json` its size, its SHA-256, and of every image the SHA-256 of its file and how many tokens it
kept. A shard counts once its list is there, so whoever is stopped in between leaves nothing half-done, and several
processes write side by side.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save
from torch import Tensor

from mmprune_train.assets import sha256_of
from mmprune_train.errors import UserError
from mmprune_train.pruning.patches import Patches

SETTINGS = "settings.json"
"""Beside the shards: what their features depend on."""
SHARD_BYTES = 256 << 20
"""Features of a whole shard."""
SHARD_SECONDS = 60.0
"""A slow encoder writes smaller shards: what an interruption loses is at most as much work as this."""
LEFTOVER_SECONDS = 3600.0
"""No write takes as long: an older temporary file is of a process that was stopped."""


@dataclass(frozen=True)
class Shard:
    """A file of features."""

    name: str
    """File name."""
    bytes: int
    sha256: str
    images: list[str]
    """SHA-256 of each image's file."""
    kept: list[int]
    """Tokens of each image."""


def read_lists(folder: Path) -> tuple[list[Shard], list[Path]]:
    """The shards of a folder as their lists have them, and the lists that cannot be read."""
    shards, broken = [], []
    for path in sorted(folder.glob("*.json")):
        if path.name == SETTINGS:
            continue
        try:
            shards.append(Shard(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            broken.append(path)
    return shards, broken


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether the file is, byte for byte, what was written."""
    path = folder / shard.name
    return path.is_file() and path.stat().st_size == shard.bytes and sha256_of(path) == shard.sha256


def remove(folder: Path, name: str) -> None:
    """Take a shard out of the cache, by the name of either of its files."""
    for suffix in (".json", ".safetensors"):
        (folder / name).with_suffix(suffix).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what stopped processes were writing."""
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)


class ShardWriter:
    """Collects images and writes them shard by shard; leaving it, whatever for, writes what is left."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES, seconds: float = SHARD_SECONDS) -> None:
        """Args:
        folder: where the shards go.
        limit: bytes of features after which a shard is written. seconds: the same in time.
        """
        self.folder = folder
        self.limit = limit
        self.seconds = seconds
        self.written: list[Shard] = []
        self._empty()

    def add(self, images: list[str], patches: Patches) -> None:
        """Images by the SHA-256 of their files, with what stage 1 left of them, in the dtype to be stored."""
        self._images += images
        self._kept += patches.kept.sum(1).tolist()
        self._chosen.append(patches.chosen.cpu())
        small = torch.int16 if patches.kept.shape[1] < 1 << 15 else torch.int32
        self._order += [row.to("cpu", small) for row in patches.entering]
        self._bytes += self._chosen[-1].nbytes
        if self._bytes >= self.limit or time.monotonic() - self._began > self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is collected. Raises UserError where the folder cannot be written."""
        if not self._images:
            return
        data = save({"chosen": torch.cat(self._chosen), "order": torch.cat(self._order)})
        name = f"{uuid.uuid4().hex}.safetensors"
        shard = Shard(name, len(data), sha256(data).hexdigest(), self._images, self._kept)
        try:
            write_whole(self.folder / name, data)
            write_whole((self.folder / name).with_suffix(".json"), json.dumps(asdict(shard), allow_nan=False).encode())
        except OSError as error:
            raise UserError(
                f"trainer.feature_cache: cannot write to {self.folder} ({error}); make room there, or name another "
                "folder by trainer.feature_cache_dir"
            ) from error
        self.written.append(shard)
        self._empty()

    def _empty(self) -> None:
        self._images: list[str] = []
        self._kept: list[int] = []
        self._chosen: list[Tensor] = []
        self._order: list[Tensor] = []
        self._bytes = 0
        self._began = time.monotonic()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in place that is on the disk before it has its name."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
