"""A run's processes: what they tell each other, and that none outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

import torch

from mmprune_train.config.command import Command
from mmprune_train.config.schema import TrainerConfig
from mmprune_train.config.typed import key_of
from mmprune_train.errors import UserError
from mmprune_train.quiet import quiet
from mmprune_train.training.cluster import environment, join, launch
from mmprune_train.training.strategies import build_strategy, start_processes
from mmprune_train.workers import ALONE, Ranks

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


def processes_asked(trainer: TrainerConfig, command: Command) -> tuple[int, int]:
    """Processes a node, and nodes, that share a task which is no training: those that a launcher has started, else
    `trainer.devices` where the command line gives it (what an experiment sets there is for training). One in a sweep.
    """
    if command.sweeping:
        return 1, 1
    typed = not {"trainer", "trainer.devices", "trainer.num_nodes"}.isdisjoint(map(key_of, command.overrides))
    devices, nodes = (trainer.devices, trainer.num_nodes) if typed else (1, 1)
    found = launch(devices)
    if found is None or found.by == "Lightning" or (found.by == "srun" and found.processes == 1):
        if nodes > 1 and (found is None or found.by == "srun"):
            raise UserError(f"trainer.num_nodes={nodes}: start torchrun --nnodes={nodes} on every node, or srun")
        return devices, nodes
    per_node = found.per_node or devices
    if found.processes % per_node:
        raise UserError(f"{found.by} started {found.processes} processes: set trainer.devices to those of a node")
    return per_node, found.processes // per_node


def start_ranks(devices: int, nodes: int, accelerator: str) -> Ranks:
    """Start, where no launcher has, and connect the processes that share a task; each has its device."""
    if devices * nodes == 1:
        return ALONE
    import pytorch_lightning as pl

    end_with_parent()
    join(devices)
    with quiet():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=build_strategy("ddp", accelerator),
            plugins=[environment(devices * nodes)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    start_processes(trainer)
    return ranks_of(trainer)


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
