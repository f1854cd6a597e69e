"""Who started this process is read from the environment, and what does not fit is told before anything waits."""

from __future__ import annotations

import os
import re

import pytest
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mmprune_train.config.command import Command
from mmprune_train.config.schema import TrainerConfig
from mmprune_train.errors import UserError
from mmprune_train.training import cluster
from mmprune_train.training.cluster import Launch, environment, has_part, join, launch, rank_here
from mmprune_train.training.processes import processes_asked

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
}  # fmt: skip
ALONE_IN_STEP = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
CHILD = {"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4"}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_JOB_ID": "50123",
}  # fmt: skip
RENDEZVOUS = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if re.match("SLURM_|SUBMITIT_|TORCHELASTIC_|MASTER_", name):
            monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", 3, 4, 2)),
        ({**SRUN, **TORCHRUN}, Launch("torchrun", 3, 4, 2)),
        (SRUN, Launch("srun", 1, 2, 1)),
        (BATCH, None),
        (CHILD, Launch("Lightning", 3, 4)),
        ({**ALONE_IN_STEP, **CHILD}, Launch("Lightning", 3, 4)),
        (LOCAL, Launch("submitit", 1, 2)),
    ],
    ids=["user", "torchrun", "torchrun in a job", "srun", "batch script", "Lightning", "Lightning in a job", "local"],
)
def test_the_launcher_is_recognised(
    variables: dict[str, str], found: Launch | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    assert launch(devices=2) == found


@pytest.mark.parametrize(
    ("variables", "processes", "kind"),
    [
        ({}, 1, LightningEnvironment),
        (TORCHRUN, 4, TorchElasticEnvironment),
        (SRUN, 2, SLURMEnvironment),
        (BATCH, 2, LightningEnvironment),
        (ALONE_IN_STEP, 2, LightningEnvironment),
        (LOCAL, 2, LightningEnvironment),
    ],
)
def test_lightning_is_told_and_leaves_the_signals_alone(
    variables: dict[str, str], processes: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    found = environment(processes)
    assert type(found) is kind and not getattr(found, "auto_requeue", False)


@pytest.mark.parametrize(
    ("variables", "rank"), [({}, 0), (SRUN, 1), (TORCHRUN, 3), (RENDEZVOUS, 2), (LOCAL, 1)], ids=str
)
def test_the_rank_is_known_from_the_start(
    variables: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # what `join` may set goes with the test
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    put(monkeypatch, variables)
    join(devices=2)
    assert rank_here(devices=2) == rank == rank_zero_only.rank
    if variables is LOCAL:
        assert environment(2).creates_processes_externally and environment(2).local_rank() == 1
        assert environment(2).main_port == cluster.FIRST_PORT + 50123 % cluster.PORTS


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "sweeping", "words"),
    [
        ({}, 2, 1, True, "hydra/launcher=submitit_local"),
        ({}, 1, 2, False, "srun --nodes=2 --ntasks-per-node=1"),
        (
            TORCHRUN,
            2,
            1,
            False,
            "torchrun started 4 processes, 2 a node, .* asks for 2: torchrun --nnodes=1 --nproc-per-node=2",
        ),
        (SRUN, 1, 1, False, "srun started 2 processes"),
        (SRUN, 2, 1, False, "srun started 2 processes, 1 a node, .*: srun --nodes=1 --ntasks-per-node=2"),
        (LOCAL, 1, 1, True, "hydra.launcher.tasks_per_node"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS_PER_NODE"}, 1, 2, False, "--ntasks-per-node=1"),
    ],
)
def test_what_was_not_started_is_missed_at_once(
    variables: dict[str, str],
    devices: int,
    nodes: int,
    sweeping: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(monkeypatch, variables)
    with pytest.raises(UserError, match=words):
        has_part("train", devices, nodes, sweeping)


HALF = [
    ({"TORCHELASTIC_RUN_ID": "x"}, "TORCHELASTIC_RUN_ID that torchrun .* but RANK is not set"),
    ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', no number: .* unset TORCHELASTIC_RUN_ID"),
    ({**TORCHRUN, "RANK": "4"}, "RANK=4 is no rank of WORLD_SIZE=4"),
    ({"SUBMITIT_EXECUTOR": "local"}, "SUBMITIT_LOCAL_GLOBALID is not set: .* unset SUBMITIT_EXECUTOR"),
    ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is not set: .* unset SLURM_STEP_ID"),
    ({**CHILD, "NODE_RANK": ""}, "NODE_RANK is '', no number"),
    ({"LOCAL_RANK": "0"}, "WORLD_SIZE is not set: .* unset LOCAL_RANK"),
]


@pytest.mark.parametrize(("variables", "words"), HALF)
def test_what_a_launcher_has_half_set_is_told(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    with pytest.raises(UserError, match=words):
        has_part("train", 2, 1, sweeping=False)


def test_training_and_evaluation_take_every_process_and_other_tasks_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_part("train", 2, 1, sweeping=False) and has_part("train", 1, 1, sweeping=True)
    assert has_part("evaluate", 8, 1, sweeping=True)
    put(monkeypatch, SRUN)
    assert has_part("train", 1, 2, sweeping=True) and has_part("evaluate", 1, 1, sweeping=False)
    assert not has_part("evaluate", 1, 2, sweeping=True) and not has_part("generate", 1, 2, sweeping=False)


@pytest.mark.parametrize(
    ("variables", "typed", "asked"),
    [
        ({}, [], (1, 1)),
        ({}, ["trainer.devices=2"], (2, 1)),
        (TORCHRUN, [], (2, 2)),
        (SRUN, [], (1, 2)),
        (CHILD, ["trainer.devices=2"], (2, 1)),
    ],
    ids=["user", "typed", "torchrun", "srun", "Lightning"],
)
def test_an_evaluation_takes_what_was_started_or_typed(
    variables: dict[str, str], typed: list[str], asked: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    assert processes_asked(TrainerConfig(devices=2), Command.of(["task=evaluate", *typed])) == asked
    assert processes_asked(TrainerConfig(devices=2), Command.of(["task=evaluate", *typed], sweeping=True)) == (1, 1)


def test_every_node_may_be_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, RENDEZVOUS)
    assert has_part("train", 2, 2, sweeping=False)
