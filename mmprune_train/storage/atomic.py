"""Files and folders that are whole or not there, and what stopped processes leave of those they were writing.

All is written under a name with a dot, brought to disk, and renamed. Folders of the cache are not brought to disk (they
may hold thousands of files): they are read by their checksums, and what a machine's failure harms is made again. What
several processes write at once has a name of its own for each, with the machine in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmprune_train.errors import UserError
from mmprune_train.storage.locks import held
from mmprune_train.storage.secrets import masked

LEFTOVER_SECONDS = 3600.0
"""Where a file system has no locks, or may not tell of those of another machine, what is older is of a process that
was stopped."""
MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""In names of what is being written. On NFS a lock on a folder is known to its own machine alone, so whether another
one's is still being written only its age can tell."""
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.mmprune")
"""Names of temporary folders, with what each is for. Such as nobody else's hidden folder has: they are deleted."""


def unused_name() -> str:
    """32 hexadecimal digits, `MACHINE` the first of them."""
    return MACHINE + uuid.uuid4().hex[len(MACHINE) :]


def unfinished(path: Path, mark: str = "") -> Path:
    """Where a file or folder is while it is written, or deleted.

    Args:
        mark: of the process, where several may do that at once, or of what is deleted.
    """
    return path.with_name(f".{path.name}{mark}.tmp")


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk, where it outlasts the machine's failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give what is whole and on disk its name; a file of that name it replaces, a folder only where that is empty."""
    os.replace(temporary, path)
    sync(path.parent)


def append(path: Path, text: str) -> None:
    """Add a text without secrets to a file and bring it to disk: what a stopped process leaves ends in a torn line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(masked(text))
    sync(path)


def write_atomically(path: Path, data: str | bytes, shared: bool = False) -> None:
    """Write a file, a text without secrets.

    Args:
        shared: several processes may write it at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path, f".{unused_name()}" if shared else "")
    try:
        temporary.unlink(missing_ok=True)  # another user's, who was stopped, might not be written to
        temporary.write_bytes(masked(data).encode() if isinstance(data, str) else data)
        sync(temporary)
        publish(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well and all of it is on disk."""
    temporary, earlier = unfinished(folder), unfinished(folder, ".old")
    for left in (temporary, earlier):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    _share_alike(temporary)
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    if folder.exists():
        os.replace(folder, earlier)
    publish(temporary, folder)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well: `target` is whole or absent.

    Where another process was faster, its folder stays and ours is thrown away; what stopped processes have left of
    theirs is thrown away, too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    delete_leftovers(target.parent, target.name)
    with temporary_folder(target.parent, target.name) as part:
        yield part
        _share_alike(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():
                raise


@contextmanager
def new_folder(target: Path, key: str) -> Iterator[Path]:
    """The same for a folder that the user has named by `key`, and of which all is brought to disk first.

    Raises:
        UserError: something is there, at the begin or at the end. It is left alone.
    """
    other = f"{key}: {target} holds something else, which is never written over; name another folder, or move it away"
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(other)
    target.parent.mkdir(parents=True, exist_ok=True)
    delete_leftovers(target.parent, target.name)
    with temporary_folder(target.parent, target.name) as part:
        yield part
        _share_alike(part)
        for path in (*part.rglob("*"), part):
            sync(path)
        try:
            publish(part, target)
        except OSError as error:
            if target.exists():
                raise UserError(other) from error
            raise


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder that others leave alone while this process lives, and that is deleted at the end, if it is there.

    Args:
        name: what it is for.
    """
    while True:
        part = parent / f".{name}.{unused_name()[:16]}.mmprune"
        part.mkdir()  # with the user's umask: mkdtemp would shut out other users of a shared cache
        try:
            descriptor = os.open(part, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for left over before it was locked
            continue
        with suppress(OSError):  # a file system without locks: its age counts there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if part.is_dir():  # as above
            break
        os.close(descriptor)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(descriptor)


def delete_leftovers(parent: Path, name: str | None = None) -> None:
    """Delete the temporary folders in a folder that are of no living process.

    Args:
        name: what they were for; None: whatever.
    """
    for left in parent.iterdir() if parent.is_dir() else ():
        ours = TEMPORARY.fullmatch(left.name)
        if ours and name in (None, ours[1]) and left.is_dir() and not left.is_symlink():
            with suppress(OSError), held(left) as free:  # another user's, or gone in the meantime
                if free is not False and is_left_over(left, free):
                    shutil.rmtree(left, ignore_errors=True)


def is_left_over(path: Path, free: bool | None) -> bool:
    """Whether what has such a name is of a process that was stopped.

    Args:
        free: whether no process of this machine holds the lock on where it writes; None: there are no locks.
    """
    return (free is True and MACHINE in path.name) or time.time() - path.stat().st_mtime > LEFTOVER_SECONDS


def remove_damaged(folder: Path) -> None:
    """Delete a folder that will be made anew, all at once: another process may be about to do the same, or read it.

    Raises:
        UserError: that cannot be done, since it is another user's.
    """
    try:
        with temporary_folder(folder.parent, folder.name) as aside, suppress(FileNotFoundError):
            folder.rename(aside / folder.name)
    except OSError as error:
        raise UserError(f"{folder} is damaged and cannot be deleted ({error.strerror}); delete it") from error


def _share_alike(folder: Path) -> None:
    """Give every file in a new folder the mode that the umask gave the folder: safetensors writes them for their owner
    alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
