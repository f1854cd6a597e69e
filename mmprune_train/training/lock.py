"""One process at a time in a run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from mmprune_train.errors import UserError

BUSY = (errno.EACCES, errno.EAGAIN)
_held: set[Path] = set()
"""Run directories that this process is alone in."""


@contextlib.contextmanager
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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise UserError(f"runs_dir: {file.parent} cannot be written to ({error.strerror}); set runs_dir=") from error
    place = int(hashlib.sha256(f"{run.parent.name}/{run.name}".encode()).hexdigest()[:7], 16)
    with file.open("ab") as handle:
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
