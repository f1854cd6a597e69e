"""Size and CRC-32 of files, one by one and in the list of a folder: how damage is found, and told by the file's name.

A checksum finds accidents; it is no protection against a forger.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from mmprune_train.storage.files import read_json, stamp_of, write_json

LIST = "checksums.json"
"""In a folder that this project alone writes: the checksums of all its files."""
BLOCK = 1 << 22


@dataclass(frozen=True)
class Checksum:
    """Size and CRC-32 of a file."""

    bytes: int
    crc32: int


def checksum_of(path: Path, size: int | None = None) -> Checksum:
    """
    Args:
        size: how many bytes, from the first; None: all.
    """
    left, crc = path.stat().st_size if size is None else size, 0
    size = 0
    with path.open("rb") as file:
        while block := file.read(min(BLOCK, left)):
            size, left, crc = size + len(block), left - len(block), zlib.crc32(block, crc)
    return Checksum(size, crc)


def files_in(folder: Path) -> list[str]:
    """All files in a folder, at whatever depth, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def checksums_of(folder: Path, within: Path | None = None) -> dict[str, Checksum]:
    """Checksums of all files in a folder, by their paths in it, or in `within`."""
    return {
        (folder / name).relative_to(within or folder).as_posix(): checksum_of(folder / name)
        for name in files_in(folder)
    }


def as_checksums(found: Any) -> dict[str, Checksum]:
    """Checksums as JSON holds them.

    Raises:
        ValueError, TypeError or AttributeError: they are something else, or name a file outside their folder.
    """
    checksums = {name: Checksum(**checksum) for name, checksum in found.items()}
    for name, checksum in checksums.items():
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name or parts[0] == "/" or ".." in parts:
            raise ValueError(f"{name!r} is no file in this folder")
        if type(checksum.bytes) is not int or type(checksum.crc32) is not int:
            raise TypeError(f"{name!r} has no size and checksum")
    return checksums


def fault_of(folder: Path, name: str, checksum: Checksum, read: Callable[[Path], Checksum]) -> str | None:
    """How a file differs from its checksum, as `read` takes it; None: it does not."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != checksum.bytes:
        return f"{name} has {size} of {checksum.bytes} bytes"
    if read(path) != checksum:
        return f"{name} has other bytes than were written"
    return None


def first_fault(folder: Path, checksums: Mapping[str, Checksum]) -> str | None:
    """The first file of a folder that differs from its checksum. A file that this process has read before, and that
    was not touched since, is not read again."""
    with ThreadPoolExecutor(4) as pool:  # checksums are taken without the interpreter's lock
        found = pool.map(lambda name: fault_of(folder, name, checksums[name], _checksum_once), checksums)
        return next((fault for fault in found if fault is not None), None)


def _checksum_once(path: Path) -> Checksum:
    return _checksum_by_stamp(*stamp_of(path))


@lru_cache(1 << 14)
def _checksum_by_stamp(path: str, *stamp: int) -> Checksum:
    return checksum_of(Path(path))


def write_list(folder: Path) -> None:
    """Record the checksums of a folder's files in it."""
    write_json(folder / LIST, {name: asdict(checksum) for name, checksum in checksums_of(folder).items()}, checked=True)


def fault_by_list(folder: Path) -> str | None:
    """The first file that is not as the folder's list has it; None: all are."""
    try:
        found = read_json(folder / LIST)
        return f"{LIST} is missing" if found is None else first_fault(folder, as_checksums(found))
    except (ValueError, TypeError, AttributeError):
        return f"{LIST} is damaged"
