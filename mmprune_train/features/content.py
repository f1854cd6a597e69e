"""Which image a file holds: the SHA-256 of its bytes, taken once for a file that does not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mmprune_train.data.images import unreadable
from mmprune_train.features.shards import INDEX
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.files import read_json, write_json
from mmprune_train.storage.user_files import file_status
from mmprune_train.workers import Ranks


class Known(NamedTuple):
    """A file as it was when its checksum was taken."""

    size: int
    mtime_ns: int
    sha256: str


def image_digests(images: Mapping[Path, str], root: Path, ranks: Ranks) -> dict[Path, str]:
    """The SHA-256 of each image file, the ranks sharing the work.

    Args:
        images: path -> who asks for it, for errors.
        root: folder of the index, which spares reading files whose size and time of change are as they were.
    Raises:
        UserError: a file is missing or cannot be read.
    """
    index: dict[str, Known] = {}
    with suppress(ValueError, TypeError):  # one that is damaged: all files are read
        index = {path: Known(*known) for path, known in (read_json(root / INDEX) or {}).items()}
    names = {path: str(path.absolute()) for path in images}

    def known(paths: Sequence[Path]) -> list[Known]:
        return [_look(path, index.get(names[path]), images[path]) for path in paths]

    found = dict(zip(images, ranks.all(known, list(images)), strict=True))
    if ranks.rank == 0 and any(index.get(names[path]) != now for path, now in found.items()):
        index.update({names[path]: now for path, now in found.items()})
        with suppress(OSError):  # it only saves time
            write_json(root / INDEX, index, checked=True, shared=True)
    return {path: now.sha256 for path, now in found.items()}


def _look(path: Path, before: Known | None, asker: str) -> Known:
    try:
        now = file_status(path)
        if before is not None and before[:2] == (now.st_size, now.st_mtime_ns):
            return before
        return Known(now.st_size, now.st_mtime_ns, sha256_of(path))
    except OSError as error:
        raise unreadable(path, asker, error) from None
