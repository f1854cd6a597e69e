"""Folders that are whole or not there, locks on folders, and what stopped processes leave beside them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmprune_train.errors import UserError
from mmprune_train.storage.files import MACHINE, sync, unused_name

LEFTOVER_SECONDS = 3600.0
"""Where a file system has no locks, or may not tell of those of another machine, what is older is of a process that
was stopped."""
TEMPORARY = re.compile(r"\.(.+)\.([0-9a-f]{8})[0-9a-f]{8}\.mmprune")
"""Names of temporary folders, with what each is for, and the machine that made it. Such as nobody else's hidden folder
has: they are deleted."""


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
        share_alike(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():
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
                known = ours[2] == MACHINE and free is not None  # else its age alone tells
                if free if known else free is not False and time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
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
        with temporary_folder(folder.parent, folder.name) as aside, suppress(FileNotFoundError):
            folder.rename(aside / folder.name)
    except OSError as error:
        raise UserError(f"{folder} is damaged and cannot be deleted ({error.strerror}); delete it") from error
