"""Who started this process and its fellows (torchrun, srun, submitit, or nobody but the user), and what follows."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import Any

from mmprune_train.errors import UserError

FIRST_PORT, PORTS = 20000, 40000
"""Where the processes of a submitit_local job meet: a port of this range, by the job's id. Our choice."""
SLURM_SECONDS = 60
"""How long one of Slurm's commands may take."""

LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "submitit": ("SUBMITIT_EXECUTOR", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", ""),
    "Lightning": ("LOCAL_RANK", "LOCAL_RANK", "WORLD_SIZE", ""),
    "srun": ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"),
}
"""Variables: by which it is known who started a process, its rank, how many there are, and on a node where that is
told. A batch script that calls no srun has SLURM_PROCID, too, and is alone."""


@dataclass(frozen=True)
class Launch:
    """A process that was started as one of several (or might have been: there may be one)."""

    by: str
    """`torchrun`, `srun`, `submitit`, or `Lightning`, which starts the others of a node from the first."""
    rank: int
    processes: int
    per_node: int | None = None
    """None: not known."""


def launch(devices: int = 1) -> Launch | None:
    """What this process was started by; None: by the user, as the only one.

    Args:
        devices: processes a node, to number those that know their node only.
    """
    here = os.environ
    for by, (mark, rank, processes, per_node) in LAUNCHERS.items():
        another = (by == "submitit" and here.get(mark) != "local") or (by == "Lightning" and processes not in here)
        if mark not in here or another:
            continue
        first = _number("NODE_RANK", by, 0) * devices if by == "Lightning" else 0
        on_node = _number(per_node, by) if per_node in here else None
        found = Launch(by, first + _number(rank, by), _number(processes, by), on_node)
        if not 0 <= found.rank < found.processes:
            raise _half_started(by, f"{rank}={here[rank]} is no rank of {processes}={found.processes}")
        return found
    return None


def _number(name: str, by: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        raise _half_started(by, f"{name} is {'not set' if text is None else f'{text!r}, no number'}")
    return int(text)


def _half_started(by: str, fault: str) -> UserError:
    mark = LAUNCHERS[by][0]
    return UserError(
        f"the environment says by {mark} that {by} started this process, but {fault}: start it by {by} again, or "
        f"unset {mark}"
    )


def has_part(task: str, devices: int, nodes: int, sweeping: bool) -> bool:
    """Whether this process has something to do: in training every one, in an evaluation that is no job of a sweep, too;
    in all other tasks the first.

    Args:
        devices: processes a node.
        sweeping: one command runs several configs.
    Raises:
        UserError: as many processes as training asks for were not started, or cannot be.
    """
    found = launch(devices)
    if task == "evaluate" and not sweeping:
        return True
    if task != "train":
        return found is None or found.rank == 0
    wanted = devices * nodes
    asked = f"trainer.devices={devices} x trainer.num_nodes={nodes}"
    if found is None or (found.by == "srun" and found.processes == 1):
        if sweeping and wanted > 1:
            raise UserError(
                f"-m with {asked}: the processes that a run starts would each run the whole sweep again; add "
                "hydra/launcher=submitit_local (on a cluster submitit_slurm), whose tasks_per_node follows "
                "trainer.devices"
            )
        left_over = os.environ.get("LOCAL_RANK") not in ((None, "0") if wanted == 1 else (None,))
        if found is None and left_over and not sweeping:  # Lightning would wait for others, for ever
            raise _half_started("Lightning", "WORLD_SIZE is not set")
        if nodes > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(
                f"trainer.num_nodes={nodes}, but this process was started alone: start torchrun --nnodes={nodes} on "
                f"every node, or srun --nodes={nodes} --ntasks-per-node={devices}, or set NODE_RANK, MASTER_ADDR and "
                "MASTER_PORT (docs/launching.md)"
            )
        return True
    if found.processes != wanted or found.per_node not in (None, devices):
        remedy = {
            "torchrun": f"torchrun --nnodes={nodes} --nproc-per-node={devices}",
            "srun": f"srun --nodes={nodes} --ntasks-per-node={devices}",
            "submitit": "leave hydra.launcher.tasks_per_node as it is",
        }.get(found.by, "unset LOCAL_RANK and WORLD_SIZE")
        started = f"{found.processes} processes" + (f", {found.per_node} a node" if found.per_node else "")
        raise UserError(
            f"{found.by} started {started}, {asked} asks for {wanted}: {remedy}, or set "
            "trainer.devices and trainer.num_nodes to what was started"
        )
    if found.by == "srun" and found.per_node is None:
        raise UserError(f"srun --ntasks={wanted}: say --ntasks-per-node={devices} in place of --ntasks")
    return True


def check_sweep_is_alone() -> None:
    """Raise UserError where a sweep is started by several processes at once: one that fails in a job alone would go on
    to the next, and each would take the other's collectives for its own. A job of submitit's is no such sweep."""
    found = launch()
    if found is not None and found.processes > 1 and "SUBMITIT_EXECUTOR" not in os.environ:
        raise UserError(
            f"-m under {found.by}, which started {found.processes} processes: start the sweep once, with "
            "hydra/launcher=submitit_local hydra.sweeper.max_batch_size=1 (on a cluster submitit_slurm), which starts "
            "the processes of each job"
        )


def is_next_turn() -> bool:
    """Whether a scheduler or torchrun has started the same command again by itself."""
    return any(os.environ.get(name, "0").strip("0 ") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def rank_here(devices: int) -> int:
    """Rank of this process among those of its run, of which a node has `devices`."""
    found = launch(devices)
    return _number("NODE_RANK", "Lightning", 0) * devices if found is None else found.rank


def join(devices: int) -> None:
    """Make Lightning know this process's rank before it has a Trainer: only the first process of a run writes."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank_here(devices)
    found = launch(devices)
    if found is not None and found.by == "submitit":
        port = FIRST_PORT + int(os.environ["SUBMITIT_LOCAL_JOB_ID"]) % PORTS
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if found.processes > 1:
            os.environ["LOCAL_RANK"] = os.environ["SUBMITIT_LOCAL_LOCALID"]


def environment(processes: int) -> Any:
    """Lightning's ClusterEnvironment for a run of so many processes.

    Left alone, Lightning takes any shell in a Slurm allocation for a task of srun, and the signals for its own.
    """
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    found = launch()
    if found is not None and found.by == "torchrun":
        return TorchElasticEnvironment()
    if found is not None and found.by == "srun" and found.processes == processes:
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def slurm_job() -> str | None:
    """The Slurm job (of an array: the element) that this process belongs to."""
    here = os.environ
    if "SLURM_ARRAY_JOB_ID" in here:
        return f"{here['SLURM_ARRAY_JOB_ID']}_{here['SLURM_ARRAY_TASK_ID']}"
    return here.get("SLURM_JOB_ID")


def slurm(*command: str) -> str:
    """What one of Slurm's commands prints; RuntimeError where it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
