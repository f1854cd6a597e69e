"""One process at a time in a run directory: two jobs of a sweep may have the same settings."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

BUSY = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Wait until no other process of this or another sweep is in the run directory `run`.

    One byte of `.locks` beside the experiments' folders is locked (POSIX record locks, which NFS has, too), so a killed
    process leaves nothing behind that would have to be removed.
    """
    file = run.parent.parent / ".locks"
    file.parent.mkdir(parents=True, exist_ok=True)
    place = int(hashlib.sha256(f"{run.parent.name}/{run.name}".encode()).hexdigest()[:7], 16)
    with file.open("ab") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno in BUSY:
                print(f"waits for another job with the same run directory, {run}", flush=True)
                fcntl.lockf(handle, fcntl.LOCK_EX, 1, place)
            else:
                print(f"note: {file} cannot be locked ({error.strerror}); give no two jobs the same run", flush=True)
        yield
