"""Locks: one process at a time in a run directory, in a folder of results, or in one of the cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mmprune_train.errors import UserError

BUSY = (errno.EACCES, errno.EAGAIN)
_held: set[Path] = set()
"""Run directories that this process is alone in."""


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


@contextmanager
def alone_in(run: Path, wait: bool = False) -> Iterator[None]:
    """Let no other process into the run directory `run` while the context lasts; it may be entered again inside.

    One byte of `.locks` beside the experiments' folders is locked (POSIX record locks, which NFS has, too), so a killed
    process leaves nothing behind that would have to be removed.

    Args:
        wait: for another process to leave.
    Raises:
        UserError: another process is there, and this one is not to wait; or nothing can be written there.
    """
    where = run.resolve()
    if where in _held:
        yield
        return
    file = run.parent.parent / ".locks"
    place = int(hashlib.sha256(f"{run.parent.name}/{run.name}".encode()).hexdigest()[:7], 16)
    with _opened(file) as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno not in BUSY:
                print(
                    f"note: {file} cannot be locked ({error.strerror}); give no two processes the same run", flush=True
                )
            elif wait:
                print(f"waits for another job with the same run directory, {run}", flush=True)
                fcntl.lockf(handle, fcntl.LOCK_EX, 1, place)
            else:
                raise UserError(
                    f"{run}: another process trains this run; wait until it has ended, or give another run_id="
                ) from error
        _held.add(where)
        try:
            yield
        finally:
            _held.discard(where)


def _opened(file: Path) -> BinaryIO:
    """The file that all users of a `runs_dir` lock bytes of, whoever made it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_RDWR | os.O_NOFOLLOW  # in a folder that others write to, too, a link would lead to any file of ours
        try:
            # not with O_CREAT: in a folder like /tmp Linux refuses that for the file of another user
            descriptor = os.open(file, how)
        except FileNotFoundError:
            with suppress(FileExistsError):  # another process has made it just now
                made = os.open(file, how | os.O_CREAT | os.O_EXCL)
                os.fchmod(made, 0o666)
                os.close(made)
            descriptor = os.open(file, how)
        return os.fdopen(descriptor, "r+b", buffering=0)
    except OSError as error:
        raise UserError(
            f"runs_dir: {file} cannot be written to ({error.strerror}), which every user of a shared runs_dir must be "
            "able to; make it so (chmod a+rw), or set runs_dir="
        ) from error


@contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Let no other process put a task's results into this folder while the context lasts: each finds there what the one
    before has left, whole, and moves it aside."""
    home = folder.parent
    home.mkdir(parents=True, exist_ok=True)
    with held(home, wait=True):
        refuse_links(home, (folder, *(folder.iterdir() if folder.is_dir() else ())))
        yield
