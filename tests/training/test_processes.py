"""No rank outlives the launcher that started it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mmprune_train.training.processes import end_with_parent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel call is Linux's")


@pytest.mark.parametrize(
    ("environment", "ends"),
    [({"LOCAL_RANK": "1"}, True), ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, True), ({}, False)],
    ids=["lightning", "torchrun", "shell"],
)
def test_a_rank_ends_with_its_launcher(environment: dict[str, str], ends: bool) -> None:
    read, write = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
                os.environ.pop(name, None)
            os.environ.update(environment)
            end_with_parent()
            os.write(write, str(os.getpid()).encode())
        time.sleep(30)
        os._exit(0)
    rank = int(os.read(read, 20))
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    until = time.monotonic() + (5 if ends else 0.3)
    while runs(rank) and time.monotonic() < until:
        time.sleep(0.01)
    assert runs(rank) != ends
    if not ends:
        os.kill(rank, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
