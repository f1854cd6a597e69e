"""When a stage is saved and which checkpoints stay.

What Lightning saves (optimizer, schedule, loops, the stream's position) is left to Lightning. The frozen weights are
the base model's, from which a resumed run starts anyway.
"""

from __future__ import annotations

import errno
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO

from mmprune_train.config.command import AGAIN
from mmprune_train.config.schema import TrainerConfig
from mmprune_train.storage.atomic import publish, sync, unfinished
from mmprune_train.storage.checksums import checksum_of
from mmprune_train.training.callbacks import MetricsWriter, StepWatch
from mmprune_train.training.checkpoint_files import (
    STATE,
    Index,
    all_checkpoints,
    name_of,
    read_index,
    remove,
    seal,
    step_of,
)
from mmprune_train.training.divergence import refuse_broken
from mmprune_train.training.processes import ranks_of

DAMAGED = ".damaged"


@dataclass(eq=False)
class Checkpoints(StepWatch):
    """Saves a stage at its end and in between. Must come after MetricsWriter, so that a checkpoint never knows of a
    step that metrics.jsonl does not."""

    folder: Path
    """The stage's checkpoints/."""
    metrics: MetricsWriter
    """Knows the loss of each step."""
    strategy: str
    """Its name, which a checkpoint records."""
    last: int
    """The stage's last step, which is always saved."""
    config: TrainerConfig
    """When to save, and what to keep."""
    saved_step: int = 0
    """A stage's start needs no checkpoint."""
    saved_at: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Since the last checkpoint."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy(trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if self.metrics.latest["loss"] is not None:  # of a step that is not applied
            self.losses.append(self.metrics.latest["loss"])
        every, minutes = self.config.checkpoint_every_steps, self.config.save_every_minutes
        due = step == self.last or (every is not None and step % every == 0)
        if not due and minutes is not None:  # by the clock of rank 0, for all ranks
            due = trainer.strategy.broadcast(time.monotonic() - self.saved_at >= 60 * minutes)
        if due:
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            done = all_checkpoints(self.folder)
            kept = f"after step {step_of(done[-1])}" if done else "from the stage's start"
            print(f"\ninterrupted; {AGAIN} continues {kept}", flush=True)

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of the present step, unless it has one, or no step was applied yet (FSDP2 would make
        a state of the optimizer for it). Every rank must call this, between two steps.

        Older ones are deleted when the new one is on disk, under its name.

        Raises NotFinite where the trained weights are not finite: no checkpoint holds such.
        """
        step = trainer.global_step
        if step == self.saved_step or not trainer.optimizers[0].state:
            return
        refuse_broken(trainer, self.folder)
        final = self.folder / name_of(step)
        temporary = unfinished(final)
        for logger in trainer.loggers:  # what they hold back would be missing after the resume
            logger.save()
        if trainer.is_global_zero:
            sync(self.metrics.path)
            remove(temporary)
            temporary.mkdir(parents=True)
        trainer.strategy.barrier("before the checkpoint")
        try:
            trainer.save_checkpoint(temporary / STATE)
        except (OSError, RuntimeError) as error:  # torch has errors of its own for a full disk
            free = shutil.disk_usage(self.folder).free / 2**30
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = (
                f"cannot be written ({why}; {free:.2f} GiB are free there); those before it are whole: "
                f"{AGAIN} continues after the newest"
            )
            if isinstance(error, OSError) or "inline_container" in str(error):  # torch's writer of files
                raise OSError(getattr(error, "errno", None) or errno.ENOSPC, what, str(final)) from error
            raise RuntimeError(f"{final} {what}") from error
        trainer.strategy.barrier("the checkpoint is written")
        loss = fmean(self.losses) if self.losses else None
        rows = checksum_of(self.metrics.path) if trainer.is_global_zero else None
        seal(temporary, Index(step, self.strategy, trainer.world_size, loss, metrics=rows), ranks_of(trainer))
        if trainer.is_global_zero:
            publish(temporary, final)
            self._delete_older()
        trainer.strategy.barrier("after the checkpoint")
        self.saved_step, self.saved_at, self.losses = step, time.monotonic(), []

    def _tidy(self, step: int) -> None:
        """Delete what a kill has left unfinished, and put aside what lies after the step that is continued: it was
        passed over as damaged, and must not count among those that are kept."""
        for left in self.folder.glob(unfinished(Path("step-*.ckpt")).name):
            remove(left)
        for later in all_checkpoints(self.folder):
            if step_of(later) > step:
                aside = later.with_name(later.name + DAMAGED)
                remove(aside)
                later.rename(aside)

    def _delete_older(self) -> None:
        for damaged in self.folder.glob(f"*{DAMAGED}"):
            remove(damaged)
        found = all_checkpoints(self.folder)
        kept = found[-self.config.keep_checkpoints :]
        if self.config.keep_best:
            kept.append(min(found, key=_loss))
        for old in found:
            if old not in kept:
                remove(old)


class PlainFile(TorchCheckpointIO):
    """torch.save into the file itself. Lightning's own way is by a copy in memory and a file in the system's temporary
    folder, for a wholeness that `Checkpoints` sees to; a kill leaves that file there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def _loss(checkpoint: Path) -> float:
    index = read_index(checkpoint)
    return float("inf") if index is None or index.loss is None else index.loss
