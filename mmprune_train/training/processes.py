"""A run's processes: what they tell each other, and that none outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

import torch

from mmprune_train.workers import Ranks

PR_SET_PDEATHSIG = 1


def ranks_of(trainer: Any) -> Ranks:
    """The processes of a Lightning Trainer, once they are connected."""
    return Ranks(trainer.global_rank, trainer.world_size, gather)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def end_with_parent() -> None:
    """Have the kernel end this process when the launcher that started it has ended, however that happened.

    Ranks wait for each other in collectives: those of a launcher that was killed would keep their memory, and a GPU's,
    until a timeout many minutes later. Only processes that Lightning's launcher or torchrun started are concerned: the
    parent of another is a shell, which may end, or a job manager with a way of its own. Linux only.
    """
    launched = os.environ.get("LOCAL_RANK", "0") != "0" or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
