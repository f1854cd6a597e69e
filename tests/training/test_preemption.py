"""A signal saves at the end of the step and ends the run; the same command, or Slurm, continues it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.training import preemption as module
from mmprune_train.training.callbacks import MetricsWriter
from mmprune_train.training.checkpoint_files import all_checkpoints
from mmprune_train.training.preemption import SIGNALS, Preempted, Preemption
from mmprune_train.training.run import run_stage
from mmprune_train.training.rundir import open_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


SHORT = (
    "stages=[instruct]", "evaluate.after_train=false", "stage.instruct.batch_size=2", "stage.instruct.max_steps=5",
    "stage.instruct.global_batch_size=4", "peft.dropout=0.3", "pruner=random",
)  # fmt: skip


def train(root: Path, runs: Path) -> list[float]:
    """The losses, with the signals heard."""
    config = compose_config([*overrides(root, runs), *SHORT, "trainer.checkpoint_every_steps=100"])
    run = open_run(config)
    with Preemption() as preemption:
        run_stage(config, "instruct", run, None, preemption)
    rows = [json.loads(line) for line in (run.stage("instruct") / "metrics.jsonl").open()]
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train(root, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_in_training_saves_the_step_and_the_run_goes_on_bit_by_bit(
    signum: signal.Signals,
    root: Path,
    whole: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = MetricsWriter.on_train_batch_start

    def signalled(self: MetricsWriter, trainer: Any, module: Any, batch: Any, number: int) -> None:
        write(self, trainer, module, batch, number)
        if trainer.global_step == 2 and batch.place.first:
            send(signum)

    monkeypatch.setattr(MetricsWriter, "on_train_batch_start", signalled)
    with pytest.raises(Preempted) as ended:
        train(root, tmp_path / "cut")
    assert (ended.value.code, ended.value.step, ended.value.signal) == (75, 3, signum)
    assert [path.name for path in all_checkpoints(tmp_path / "cut/smoke/t/instruct/checkpoints")] == [
        "step-00000003.ckpt"
    ]
    assert (
        f"{signum.name}: ended after step 3; the same command (without restart=true) continues"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(MetricsWriter, "on_train_batch_start", write)
    assert train(root, tmp_path / "cut") == whole


def test_outside_of_training_it_ends_where_it_is_and_gives_the_handlers_back() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Preempted) as ended, Preemption():
        send(signal.SIGTERM)
    assert ended.value.code == 75 and ended.value.step is None
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_only_the_first_process_says_so_in_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.rank_zero_only, "rank", 1)
    assert Preempted(signal.SIGTERM).code == 0


def test_signals_of_one_moment_are_one_and_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(module, "_end_at_once", killed.append)
    with Preemption() as preemption:
        preemption.training = True
        send(signal.SIGTERM)
        send(signal.SIGUSR2)
        assert preemption.signal == signal.SIGTERM and not killed
        monkeypatch.setattr(module, "TOGETHER", 0.0)
        send(signal.SIGUSR2)
        assert killed == [signal.SIGUSR2]


SLURM = '#!/bin/sh\necho "$0 $*" >> {log}\n'


@pytest.mark.parametrize(
    ("state", "refusal", "requeued", "told"),
    [
        ("RUNNING", "", True, "goes back in the queue"),
        ("COMPLETING", "", False, "was cancelled"),
        ("RUNNING", "echo disabled >&2; exit 1", True, "is not put back in the queue: scontrol requeue 4_1: disabled"),
    ],
)
def test_slurm_puts_a_job_that_still_runs_back_in_the_queue(
    state: str,
    refusal: str,
    requeued: bool,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, line in (("squeue", f"echo {state}"), ("scontrol", refusal)):
        (tmp_path / name).write_text(SLURM.format(log=tmp_path / "log") + line)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("JOB_ID", "5"), ("ARRAY_JOB_ID", "4"), ("ARRAY_TASK_ID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(Preempted), Preemption():
        send(signal.SIGUSR1)
    assert ("scontrol requeue 4_1" in (tmp_path / "log").read_text()) == requeued
    assert told in capsys.readouterr().out


def test_a_job_of_submitit_is_requeued_by_submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    def requeue(signum: int, frame: Any) -> None:
        raise SystemExit(144)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit) as ended, Preemption():
            send(signal.SIGTERM)
        assert ended.value.code == 144
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all(root: Path, tmp_path: Path) -> None:
    steps = ("stage.instruct.max_steps=300", "trainer.devices=2", "strategy=ddp", "trainer.num_workers=1")
    command = [sys.executable, "-m", "mmprune_train", *overrides(root, tmp_path), *SHORT, *steps]
    folder = tmp_path / "smoke/t/instruct"

    def rows() -> int:
        return (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").is_file() else 0

    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while rows() < 2 and time.monotonic() < end:
        time.sleep(0.1)
    run.send_signal(signal.SIGUSR1)
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 75 and f"SIGUSR1: ended after step {rows()}" in told
    assert all_checkpoints(folder / "checkpoints")[-1].name == f"step-{rows():08d}.ckpt"
