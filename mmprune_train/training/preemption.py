"""A signal that asks a run to end (SIGUSR1, SIGUSR2, SIGTERM) saves it first; under Slurm it goes back in the queue."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mmprune_train.config.command import AGAIN
from mmprune_train.training.callbacks import StepWatch
from mmprune_train.training.checkpoints import Checkpoints
from mmprune_train.training.cluster import slurm, slurm_job

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
EXIT_CODE = 75
"""Of a preempted run: `EX_TEMPFAIL` of sysexits.h, "try again later"; the same command continues."""
TOGETHER = 5.0
"""Seconds in which further signals belong to the first (Slurm and torchrun send several); a later one ends the run at
once. Our choice."""


class Preempted(SystemExit):
    """The run was asked to end and has. Only its first process says so in its exit code: launchers end the others of a
    job when one fails, and the first may still be about to put the job back in the queue."""

    def __init__(self, signum: int, step: int | None = None) -> None:
        """
        Args:
            step: the optimizer step after which the stage was saved; None: nothing was being trained.
        """
        super().__init__(EXIT_CODE if rank_zero_only.rank == 0 else 0)
        self.signal = signal.Signals(signum)
        self.step = step


class Preemption:
    """Context of a run, in which the signals end it in an orderly way.

    In training they are remembered until the running optimizer step has ended on all processes (`EndWhenAsked`);
    elsewhere they raise Preempted where they come.
    """

    def __init__(self) -> None:
        self.training = False
        self.signal = 0
        """Number of the signal that came; 0: none."""
        self._came = 0.0
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # signals come to no other
            self._before = {each: signal.getsignal(each) for each in SIGNALS}
            self.listen()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        try:
            if isinstance(error, Preempted) and rank_zero_only.rank == 0:
                self._end(error)
        finally:
            for each, handler in self._before.items():
                signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Take the signals; again where Lightning has put a handler on SIGTERM, which talks to other processes in the
        midst of whatever they are at."""
        for each in self._before:
            signal.signal(each, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked from here: the signals are its parent's business
            if signum == signal.SIGTERM:
                _end_at_once(signum)
        elif not self.signal:
            self.signal, self._came = signum, time.monotonic()
            if not self.training:
                raise Preempted(signum)
            if rank_zero_only.rank == 0:
                told = f"{signal.Signals(signum).name}: saves at the end of this step; a second one ends at once"
                os.write(2, f"\n{told}\n".encode())  # print cannot be called from within a print
        elif time.monotonic() - self._came > TOGETHER:
            _end_at_once(signum)

    def _end(self, end: Preempted) -> None:
        saved = "" if end.step is None else f" after step {end.step}"
        print(f"{end.signal.name}: ended{saved}; {AGAIN} continues", flush=True)
        if end.step is None and end.signal == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
            print("not put back in the queue: torchrun ends all processes where one of them has failed", flush=True)
            return
        again = self._submitit()
        if (job := slurm_job()) is not None:
            try:
                if slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T") != "RUNNING":
                    print(
                        f"Slurm job {job} was cancelled or is at its time limit: not put back in the queue", flush=True
                    )
                    return
                if again is None:
                    print(f"Slurm job {job} goes back in the queue", flush=True)
                    slurm("scontrol", "requeue", job)  # which ends it here
            except RuntimeError as error:
                print(f"Slurm job {job} is not put back in the queue: {error}", flush=True)
                return
        if again is not None:
            again(end.signal, None)  # writes what to run again, requeues and exits; an error where that was too often

    def _submitit(self) -> Callable[[int, None], None] | None:
        """What submitit has put on the signal by which it is told of preemption; None: this is no job of submitit's."""
        if "SUBMITIT_EXECUTOR" not in os.environ:
            return None
        handler = self._before.get(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
        return handler if callable(handler) else None


@dataclass(eq=False)
class EndWhenAsked(StepWatch):
    """Saves and ends all processes of a run at the end of the step in which a signal came to any of them. Must come
    after Checkpoints."""

    preemption: Preemption
    saves: Checkpoints

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.preemption.training = True
        self.preemption.listen()

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        came = torch.tensor(self.preemption.signal, device=trainer.strategy.root_device)
        if signum := int(trainer.strategy.reduce(came, reduce_op="max")):
            self.saves.save(trainer)
            raise Preempted(signum, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_step_end(trainer, pl_module)  # one that came since
        self.preemption.training = False


@contextmanager
def withheld() -> Iterator[None]:
    """Processes that are started in this context never get the signals, which Slurm sends to a job's every process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_at_once(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
