"""Folders that are whole or not there, what their files are known by, and what stopped processes leave beside them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from mmprune_train.errors import UserError
from mmprune_train.files import read_json, stamp_of, sync, write_json

LIST = "checksums.json"
"""In a folder that this project alone writes: the marks of all its files."""
LEFTOVER_SECONDS = 3600.0
"""Where a file system has no locks, what is older is of a process that was stopped."""
BLOCK = 1 << 22
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.mmprune")
"""Names of temporary folders, with what each is for. Such as nobody else's hidden folder has: they are swept."""


@dataclass(frozen=True)
class Mark:
    """What a file is known by."""

    bytes: int
    crc32: int


def mark_of(path: Path, size: int | None = None) -> Mark:
    """Args:
    size: how many bytes, from the first; None: all.
    """
    left, crc = path.stat().st_size if size is None else size, 0
    size = 0
    with path.open("rb") as file:
        while block := file.read(min(BLOCK, left)):
            size, left, crc = size + len(block), left - len(block), zlib.crc32(block, crc)
    return Mark(size, crc)


def files_in(folder: Path) -> list[str]:
    """All files in a folder, at whatever depth, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def marks_of(folder: Path, within: Path | None = None) -> dict[str, Mark]:
    """Marks of all files in a folder, by their paths in it, or in `within`."""
    return {
        (folder / name).relative_to(within or folder).as_posix(): mark_of(folder / name) for name in files_in(folder)
    }


def as_marks(found: Any) -> dict[str, Mark]:
    """Marks as JSON holds them.

    Raises:
        ValueError, TypeError or AttributeError: they are something else, or name a file outside their folder.
    """
    marks = {name: Mark(**mark) for name, mark in found.items()}
    for name, mark in marks.items():
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name or parts[0] == "/" or ".." in parts:
            raise ValueError(f"{name!r} is no file in this folder")
        if type(mark.bytes) is not int or type(mark.crc32) is not int:
            raise TypeError(f"{name!r} has no size and checksum")
    return marks


def fault_of(folder: Path, name: str, mark: Mark, read: Callable[[Path], Mark] | None = mark_of) -> str | None:
    """How a file differs from its mark; None: it does not.

    Args:
        read: None: its size alone is compared.
    """
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != mark.bytes:
        return f"{name} has {size} of {mark.bytes} bytes"
    if read is not None and read(path) != mark:
        return f"{name} has other bytes than were written"
    return None


def first_fault(folder: Path, marks: Mapping[str, Mark]) -> str | None:
    """The first file of a folder that differs from its mark. A file that this process has read before, and that was not
    touched since, is not read again."""
    with ThreadPoolExecutor(4) as pool:  # checksums are taken without the interpreter's lock
        found = pool.map(lambda name: fault_of(folder, name, marks[name], _seen_mark), marks)
        return next((fault for fault in found if fault is not None), None)


def _seen_mark(path: Path) -> Mark:
    return _mark_of_very(*stamp_of(path))


@lru_cache(1 << 14)
def _mark_of_very(path: str, *stamp: int) -> Mark:
    return mark_of(Path(path))


def write_list(folder: Path) -> None:
    """Record what the files of a folder are known by, in the folder."""
    write_json(folder / LIST, {name: asdict(mark) for name, mark in marks_of(folder).items()}, checked=True)


def fault_by_list(folder: Path) -> str | None:
    """The first file that is not as the folder's list has it; None: all are."""
    try:
        found = read_json(folder / LIST)
        return f"{LIST} is missing" if found is None else first_fault(folder, as_marks(found))
    except (ValueError, TypeError, AttributeError):
        return f"{LIST} is damaged"


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well: `target` is whole or absent.

    Where another process was faster, its folder stays and ours is thrown away; what stopped processes have left of
    theirs is thrown away, too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, target.name)
    with temporary_folder(target.parent, target.name) as part:
        yield part
        share_alike(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():
                raise


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder that `sweep` leaves alone while this process lives, and that is deleted at the end, if it is there.

    Args:
        name: what it is for.
    """
    while True:
        part = parent / f".{name}.{uuid.uuid4().hex[:8]}.mmprune"
        part.mkdir()  # with the user's umask: mkdtemp would shut out other users of a shared cache
        descriptor = os.open(part, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: `sweep` goes by age there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if part.is_dir():  # not swept before it was locked
            break
        os.close(descriptor)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(descriptor)


def sweep(parent: Path, name: str | None = None) -> None:
    """Delete the temporary folders in a folder that are of no living process.

    Args:
        name: what they were for; None: whatever.
    """
    for left in parent.iterdir() if parent.is_dir() else ():
        ours = TEMPORARY.fullmatch(left.name)
        if ours and name in (None, ours[1]) and left.is_dir() and not left.is_symlink():
            with suppress(OSError), held(left) as free:  # another user's, or gone in the meantime
                if free or (free is None and time.time() - left.stat().st_mtime > LEFTOVER_SECONDS):
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def held(folder: Path, wait: bool = False, together: bool = False) -> Iterator[bool | None]:
    """Lock a folder while the block lasts; a process that is killed leaves nothing of it behind.

    Args:
        wait: for those who hold it.
        together: let others in who ask for this, too.
    Returns:
        Whether it is held; False: another process holds it; None: the file system has no such locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    how = (fcntl.LOCK_SH if together else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    state: bool | None = True
    try:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            state = False
        except OSError:
            state = None
        yield state
    finally:
        os.close(descriptor)


def refuse_links(home: Path, places: Iterable[Path]) -> None:
    """Raise UserError for one of the places in a folder that is a link out of it: what is written there, or deleted,
    would be somebody else's."""
    root = os.path.realpath(home)
    for place in places:
        if place.is_symlink() and os.path.commonpath((root, real := os.path.realpath(place))) != root:
            raise UserError(
                f"{place} is a link to {real}, and what is written there would change it; remove the link, or put what "
                "it leads to in its place"
            )


def share_alike(folder: Path) -> None:
    """Give every file in a new folder the mode that the umask gave the folder: safetensors writes them for their owner
    alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well and all of it is on disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    share_alike(temporary)
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def remove_damaged(folder: Path) -> None:
    """Delete a folder that will be made anew, all at once: another process may be about to do the same, or read it.

    Raises:
        UserError: that cannot be done, since it is another user's.
    """
    try:
        with temporary_folder(folder.parent, f".{folder.name}.") as aside, suppress(FileNotFoundError):
            folder.rename(aside / folder.name)
    except OSError as error:
        raise UserError(f"{folder} is damaged and cannot be deleted ({error.strerror}); delete it") from error
