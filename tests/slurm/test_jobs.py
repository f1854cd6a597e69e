"""Runs as jobs of a real Slurm with two nodes: a sweep as an array, two nodes, preemption and what follows it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster
from training.synthetic import overrides, write_dataset
from training.wandb_file import history

pytestmark = pytest.mark.slurm

STEPS = 40
"""Enough for a signal to come before the last."""
SETTINGS = (
    "stages=[instruct]", "evaluate.after_train=false", "trainer.accelerator=cpu", "stage.instruct.batch_size=4",
    "stage.instruct.global_batch_size=8", f"stage.instruct.max_steps={STEPS}", "logger=wandb", "trainer.num_workers=1",
    "trainer.checkpoint_every_steps=1000", "trainer.precision=fp32", "optim.eps=0.003",
)  # fmt: skip
BOTH = ("trainer.num_nodes=2", "strategy=deepspeed_zero2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


def command(root: Path, runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mmprune_train", *overrides(root, runs), *SETTINGS, *more]


def losses(runs: Path, run_id: str = "t") -> list[float]:
    rows = [json.loads(line) for line in (runs / "smoke" / run_id / "instruct" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def plainly(root: Path, runs: Path, *more: str) -> list[float]:
    """The losses without Slurm."""
    done = subprocess.run(command(root, runs, *more), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(runs)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return plainly(root, tmp_path_factory.mktemp("alone"))


def submit(cluster: Cluster, folder: Path, arguments: list[str], *options: str) -> str:
    """Give Slurm the batch script of docs/launching.md; the job's number."""
    script = folder / "job.sh"
    lines = [f"#SBATCH --{option}" for option in (*options, "open-mode=append", f"output={folder}/out.txt")]
    script.write_text("\n".join(["#!/bin/bash", *lines, "srun " + " ".join(arguments)]) + "\n")
    return cluster.run("sbatch", "--parsable", str(script))


def until(done: Callable[[], Any], seconds: float, what: Path | None = None) -> None:
    end = time.monotonic() + seconds
    while not done():
        told = what.read_text()[-4000:] if what and what.is_file() else ""
        assert time.monotonic() < end, f"not within {seconds} s\n{told}"
        time.sleep(0.2)


def ended(cluster: Cluster, job: str) -> bool:
    return not cluster.run("squeue", "--noheader", f"--jobs={job}", "--states=PENDING,RUNNING,COMPLETING")


def job_field(cluster: Cluster, job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", cluster.run("scontrol", "show", "job", job))
    assert found
    return found[1]


def trained(runs: Path) -> bool:
    return any(file.read_text().count("\n") >= 3 for file in runs.glob("smoke/*/instruct/metrics.jsonl"))


def check_one_run(runs: Path, starts: int) -> None:
    """One run directory, and one wandb run that was begun `starts` times and has every step once."""
    assert [path.name for path in (runs / "smoke").iterdir()] == ["t"]
    names = [path.stem.removeprefix("run-") for path in runs.glob("smoke/t/instruct/wandb/offline-run-*/*.wandb")]
    assert len(names) == starts and len(set(names)) == 1
    newest = max(runs.glob("smoke/t/instruct/wandb/offline-run-*/*.wandb"))
    assert [row["_step"] for row in history(newest)] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def on_two_nodes(cluster: Cluster, root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("on_two_nodes")
    job = submit(cluster, folder, command(root, folder, *BOTH), "nodes=2", "ntasks-per-node=1")
    until(lambda: ended(cluster, job), 240, folder / "out.txt")
    assert job_field(cluster, job, "JobState") == "COMPLETED", (folder / "out.txt").read_text()
    return losses(folder)


def test_a_sweep_is_an_array(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    sweep = ("hydra/launcher=submitit_slurm", "seed=1,2", "run_id=seed${seed}", "stage.instruct.max_steps=2", "-m")
    arguments = command(root, tmp_path, *sweep)
    where = {**environment(), **cluster.environment}
    done = subprocess.run(arguments, env=where, capture_output=True, text=True, timeout=240)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("sweeps/**/*_log.out"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    for seed in (1, 2):
        assert len(losses(tmp_path, f"seed{seed}")) == 2
        assert (tmp_path / f"smoke/seed{seed}/result.json").is_file()
    elements = {path.parent.name.split("_")[1] for path in tmp_path.glob("sweeps/**/*_0_log.out")}
    assert elements == {"0", "1"}, "two elements of one array"


def test_two_nodes_with_zero_2_equal_one_process(on_two_nodes: list[float], alone: list[float]) -> None:
    assert on_two_nodes == pytest.approx(alone, rel=1e-5)


def test_a_signal_before_the_time_limit_saves_and_requeues(
    cluster: Cluster, root: Path, tmp_path: Path, on_two_nodes: list[float]
) -> None:
    arguments = command(root, tmp_path, *BOTH)
    job = submit(cluster, tmp_path, arguments, "nodes=2", "ntasks-per-node=1", "signal=USR1@120")
    until(lambda: trained(tmp_path), 120, tmp_path / "out.txt")
    cluster.run("scancel", "--signal=USR1", job)
    until(lambda: ended(cluster, job), 240, tmp_path / "out.txt")
    told = (tmp_path / "out.txt").read_text()
    assert job_field(cluster, job, "Restarts") == "1", told
    saved = re.search(r"SIGUSR1: ended after step (\d+)", told)
    assert saved and 0 < int(saved[1]) < STEPS and f"continues after step {saved[1]}" in told
    assert losses(tmp_path) == on_two_nodes
    check_one_run(tmp_path, starts=2)


def test_a_job_of_submitit_gives_way_to_an_urgent_one_and_goes_on(
    cluster: Cluster, root: Path, tmp_path: Path, alone: list[float]
) -> None:
    arguments = command(root, tmp_path, "hydra/launcher=submitit_slurm", "-m")
    with (tmp_path / "out.txt").open("w") as out:
        waiting = subprocess.Popen(arguments, env={**environment(), **cluster.environment}, stdout=out, stderr=out)
    until(lambda: trained(tmp_path), 120, tmp_path / "out.txt")
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.run("sbatch", *urgent)
    assert waiting.wait(timeout=240) == 0, (tmp_path / "out.txt").read_text()
    (log,) = tmp_path.glob("sweeps/**/*_0_log.out")
    assert re.search(r"SIGTERM: ended after step \d+", log.read_text()), log.read_text()
    assert losses(tmp_path) == alone
    check_one_run(tmp_path, starts=2)


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, command(root, tmp_path))
    until(lambda: trained(tmp_path), 120, tmp_path / "out.txt")
    cluster.run("scancel", job)
    until(lambda: ended(cluster, job), 60, tmp_path / "out.txt")
    assert job_field(cluster, job, "JobState") == "CANCELLED"
    assert "not put back in the queue" in (tmp_path / "out.txt").read_text()
    assert list(tmp_path.glob("smoke/t/instruct/checkpoints/step-*.ckpt"))
