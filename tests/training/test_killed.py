"""A run that SIGKILL ends, again and again, gives the loss series of one that nothing disturbed, bit by bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import command
from training.synthetic import overrides, write_dataset

from mmprune_train.training.checkpoint_files import all_checkpoints, step_of

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
        self.group = 0
        self.alive: Callable[[], bool] = lambda: False
        self.end: Callable[[float], int] = lambda _: 0
        """Waits so many seconds for the exit code."""

    def start(self) -> None:
        """`python -m mmprune_train`."""
        program = [sys.executable, "-m", "mmprune_train", *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            started = subprocess.Popen(program, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.group, self.alive, self.end = started.pid, lambda: started.poll() is None, started.wait

    def fork(self, dies_while_saving: int | None = None) -> None:
        """The same, for one process."""
        forked = command.start(self.arguments, self.log, dies_while_saving)

        def end(seconds: float) -> int:
            forked.join(seconds)
            assert forked.exitcode is not None, f"runs on after {seconds} seconds: {self.said()}"
            return forked.exitcode

        self.group, self.alive, self.end = forked.pid or 0, forked.is_alive, end

    def wait_for(self, step: int) -> None:
        """Until step `step` of the whole run is logged."""
        until = time.monotonic() + 120
        while len(self.rows()) < step:
            assert self.alive() and time.monotonic() < until, self.said()
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL for all its processes."""
        try:
            os.killpg(self.group, signal.SIGKILL)
        except ProcessLookupError:  # so young that it has no group of its own
            os.kill(self.group, signal.SIGKILL)
        assert self.end(30) == -signal.SIGKILL, "it had ended before"

    def finish(self) -> None:
        assert self.end(300) == 0, self.said()

    def said(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else "nothing"

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
    assert logged(run) == logged(whole) == [row["step"] for row in whole.rows()]
    assert len({row["loss"] for row in run.rows()}) == len(run.rows())
    weights, expected = run.weights(), whole.weights()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)


def logged(run: Run) -> list[int]:
    """Steps in metrics.csv of both stages."""
    files = [run.folder / stage / "metrics.csv" for stage in STAGES]
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()[1:]]
    return [int(line.split(",")[0]) for line in lines]


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
    whole, run = Run(root, runs / "whole", *settings), Run(root, runs / "killed", *settings)
    whole.start()
    chance = random.Random(5)
    for kill, step in enumerate(sorted(chance.sample(range(1, 17), 9))):
        run.fork()
        run.wait_for(step)
        time.sleep(chance.random() * 0.2)
        run.kill()
        if kill == 5:
            cut_off_while_saving(run)
    run.start()
    run.finish()
    whole.finish()
    assert_equal(run, whole)
    assert len(run.checkpoints()) == 2 and not list(run.folder.rglob(".*tmp*"))


def cut_off_while_saving(run: Run) -> None:
    """One more kill, in the middle of writing the next checkpoint."""
    before = run.checkpoints()
    last = step_of(before[-1]) if before else 0
    run.fork(dies_while_saving=last + 3)
    assert run.end(120) == -signal.SIGKILL, run.said()
    (half,) = (run.folder / "instruct" / "checkpoints").glob(".step-*.tmp/state")
    assert half.stat().st_size > 0 and run.checkpoints() == before


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", ()), ("fsdp2", ("peft=none",)), ("deepspeed_zero2", ()), ("deepspeed_zero3", ("peft=none",))],
    ids=["ddp", "fsdp2_full", "zero2", "zero3_full"],
)
def test_two_processes_killed_and_their_newest_checkpoint_torn(
    strategy: str, more: tuple[str, ...], root: Path, runs: Path
) -> None:
    settings = ("stages=[instruct]", f"strategy={strategy}", "trainer.devices=2", "stage.instruct.max_steps=10", *more)
    whole, run = Run(root, runs / "whole", *settings), Run(root, runs / "killed", *settings)
    whole.start()
    whole.finish()
    run.start()
    run.wait_for(8)
    os.kill(run.group, signal.SIGKILL)  # the launcher alone: the ranks that it started must not stay behind
    run.end(30)
    until = time.monotonic() + 10
    while left := members(run.group):
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.05)
    newest = run.checkpoints()[-1]
    assert newest.name == "step-00000006.ckpt"
    tear(newest, strategy)
    run.start()
    run.finish()
    said = run.log.read_text()
    assert "step-00000006.ckpt is damaged" in said and "step-00000003.ckpt is whole" in said
    assert "continues after step 3" in said
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
