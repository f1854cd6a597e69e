"""The files of the feature cache: safetensors shards that are whole or not there, each beside a list of its images.

`ID.safetensors` holds `chosen` [K, D] and `order` [K] (int16, or int32 where an image has more patches) of its images,
one after the other; `ID.json` its size, its SHA-256, and of every image the SHA-256 of its file and how many tokens it
kept. A shard counts once its list is there, so whoever is stopped in between leaves nothing half-done, and several
processes write side by side.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.packed.patches import Patches
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.atomic import is_left_over, unused_name, write_atomically
from mmprune_train.storage.files import read_json, write_json
from mmprune_train.storage.locks import held

SETTINGS = "settings.json"
"""Beside the shards: what their features depend on."""
INDEX = "images.json"
"""In the cache's folder: absolute path -> what was known of the file."""
NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
SHARD_BYTES = 256 << 20
"""Features of a whole shard."""
SHARD_SECONDS = 60.0
"""A slow encoder writes smaller shards: what an interruption loses is at most as much work as this."""


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
            shard = Shard(**(read_json(path) or {}))
            if shard.name != path.with_suffix(".safetensors").name:  # of no other file is it to say anything
                raise ValueError(shard.name)
            if len(shard.images) != len(shard.kept) or not all(type(kept) is int for kept in shard.kept):
                raise ValueError(shard.kept)
            shards.append(shard)
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
    """Delete what stopped processes were writing: files that have no name yet, and shards without a list. Where another
    process writes there now, or another machine may, what is young may be its."""
    with held(folder) as alone:
        shards = [path for path in folder.glob("*.safetensors") if NAME.fullmatch(path.name)]
        unlisted = [path for path in shards if not path.with_suffix(".json").is_file()]
        for path in (*folder.glob(".*.tmp"), *folder.parent.glob(f".{INDEX}.*.tmp"), *unlisted):
            with suppress(OSError):  # another user's, or gone in the meantime
                if is_left_over(path, alone):
                    path.unlink()


@dataclass(eq=False)
class ShardWriter:
    """Collects images and writes them shard by shard; closing it writes what is left."""

    folder: Path
    limit: int = SHARD_BYTES
    """Bytes of features after which a shard is written."""
    seconds: float = SHARD_SECONDS
    written: list[Shard] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
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
            self.close()

    def close(self) -> None:
        """Write what is collected. Raises UserError where the folder cannot be written."""
        if not self._images:
            return
        data = save({"chosen": torch.cat(self._chosen), "order": torch.cat(self._order)})
        name = f"{unused_name()}.safetensors"
        shard = Shard(name, len(data), sha256(data).hexdigest(), self._images, self._kept)
        try:
            with held(self.folder, wait=True, together=True):
                write_atomically(self.folder / name, data)
                write_json((self.folder / name).with_suffix(".json"), asdict(shard), checked=True)
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
