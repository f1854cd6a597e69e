"""A run that SIGKILL ends, again and again, gives the loss series of one that nothing disturbed, bit by bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.synthetic import overrides, write_dataset

from mmprune_train.training.checkpoint_files import all_checkpoints

pytestmark = pytest.mark.slow

CLOCKED = ("step_seconds", "data_seconds", "samples_per_second", "tflops", "mfu")
STAGES = ("pretrain", "instruct")
# dropout, random scores, a random schedule, accumulation, several epochs: everything that has a state
SETTINGS = (
    "evaluate.after_train=false", "peft.dropout=0.3", "pruner=random", "pruner.schedule.name=random",
    "stage.pretrain.batch_size=2", "stage.instruct.batch_size=2", "trainer.checkpoint_every_steps=3",
)  # fmt: skip


class Run:
    """One command, started as often as it takes, each time in a process group of its own."""

    def __init__(self, root: Path, runs: Path, *settings: str) -> None:
        self.folder = runs / "smoke" / "t"
        self.arguments = [*overrides(root, runs), *SETTINGS, *settings]
        self.log = runs.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *program: str) -> None:
        command = [sys.executable, *(program or ("-m", "mmprune_train")), *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def finish(self) -> None:
        self.start()
        assert self.process is not None and self.process.wait(timeout=300) == 0, self.log.read_text()[-3000:]

    def kill_at(self, step: int, moment: float = 0.0) -> None:
        """SIGKILL for all its processes, `moment` seconds after step `step` of the whole run was logged."""
        self.start()
        self.wait_for(step)
        time.sleep(moment)
        self.kill()

    def wait_for(self, step: int) -> None:
        assert self.process is not None
        until = time.monotonic() + 120
        while len(self.rows()) < step:
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.wait(timeout=30) == -signal.SIGKILL, "it had ended before"

    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl of both stages, without what a clock decides."""
        files = [self.folder / stage / "metrics.jsonl" for stage in STAGES]
        lines = [line for file in files if file.is_file() for line in file.read_text().splitlines(True)]
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: value for key, value in row.items() if key not in CLOCKED} for row in rows]

    def checkpoints(self, stage: str = "instruct") -> list[Path]:
        return all_checkpoints(self.folder / stage / "checkpoints")

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "instruct" / "model" / "model.safetensors")


def assert_equal(run: Run, whole: Run) -> None:
    assert run.rows() == whole.rows()
    assert len({row["loss"] for row in run.rows()}) == len(run.rows())
    weights, expected = run.weights(), whole.weights()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    leave_none(tmp_path)


def leave_none(folder: Path) -> None:
    """End what a failed test has left running on these files."""
    for pid in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            if f"runs_dir={folder}" in Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace"):
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            continue


def test_ten_kills_at_random_moments_of_both_stages(root: Path, runs: Path) -> None:
    settings = ("stage.pretrain.max_steps=5", "stage.instruct.max_steps=13")
    whole = Run(root, runs / "whole", *settings)
    whole.finish()
    chance = random.Random(5)
    moments = sorted(chance.sample(range(1, 17), 9))
    run = Run(root, runs / "killed", *settings)
    for step in moments[:7]:
        run.kill_at(step, chance.random() * 0.2)
    done = run.checkpoints()[-1:]
    last = int(done[0].stem.removeprefix("step-")) if done else 0
    run.start(str(Path(__file__).with_name("die_while_saving.py")), str(last + 3))
    assert run.process is not None and run.process.wait(timeout=120) == -signal.SIGKILL
    (cut_off,) = (run.folder / "instruct" / "checkpoints").glob(".step-*.tmp/state")
    assert cut_off.stat().st_size > 0 and run.checkpoints()[-1:] == done
    for step in moments[7:]:
        run.kill_at(step, chance.random() * 0.2)
    run.finish()
    assert_equal(run, whole)
    assert len(run.checkpoints()) == 2 and not list(run.folder.rglob(".*tmp*"))


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", ()), ("deepspeed_zero2", ()), ("deepspeed_zero3", ("peft=none",))],
    ids=["ddp", "zero2", "zero3_full"],
)
def test_two_processes_killed_and_their_newest_checkpoint_torn(
    strategy: str, more: tuple[str, ...], root: Path, runs: Path
) -> None:
    settings = ("stages=[instruct]", f"strategy={strategy}", "trainer.devices=2", "stage.instruct.max_steps=10", *more)
    whole = Run(root, runs / "whole", *settings)
    whole.finish()
    run = Run(root, runs / "killed", *settings)
    run.start()
    run.wait_for(7)
    assert run.process is not None
    run.process.kill()  # the launcher alone: the ranks that it started must not stay behind
    run.process.wait(timeout=30)
    until = time.monotonic() + 10
    while left := members(run.process.pid):
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.05)
    newest = run.checkpoints()[-1]
    assert newest.name == "step-00000006.ckpt"
    tear(newest, strategy)
    run.kill_at(9, random.Random(strategy).random() * 0.2)  # from step 3, the newest whole one
    assert (
        "step-00000006.ckpt is damaged" in run.log.read_text() and "step-00000003.ckpt is whole" in run.log.read_text()
    )
    run.finish()
    assert_equal(run, whole)


def tear(checkpoint: Path, strategy: str) -> None:
    """A file cut off, or the file of a rank lost."""
    files = sorted((checkpoint / "state").rglob("*rank_1_*optim_states.pt")) or [checkpoint / "state"]
    if strategy == "deepspeed_zero2":
        files[0].unlink()
    else:
        os.truncate(files[0], files[0].stat().st_size // 2)


def members(group: int) -> list[str]:
    """Processes of a group that run; one that has ended and that nobody has waited for does not."""
    found = []
    for pid in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            state, _, member_of = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member_of) == group and state != "Z":
            found.append(pid)
    return found
