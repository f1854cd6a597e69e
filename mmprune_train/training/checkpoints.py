"""Checkpoints of the trained weights and everything else an exact resume needs, written whole or not at all.

What Lightning saves (optimizer, schedule, loops, the stream's position) is left to Lightning. The frozen weights are
the base model's, from which a resumed run starts anyway.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from mmprune_train.training.callbacks import StepWatch

PATTERN = re.compile(r"step-(\d+)\.ckpt")


class Checkpoints(StepWatch):
    """Saves every `every` steps and keeps the last `keep`. Must come after MetricsWriter, so that a checkpoint never
    knows of a step that metrics.jsonl does not."""

    def __init__(self, folder: Path, every: int, keep: int, last: int) -> None:
        """Args:
        folder: the stage's checkpoints/. every: optimizer steps between two; 0: only at the end.
        keep: how many stay. last: the stage's last step, which is always saved.
        """
        super().__init__()
        self.last = last
        self.folder = folder
        self.every = every
        self.keep = max(1, keep)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if step == self.last or (self.every > 0 and step % self.every == 0):
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            done = all_checkpoints(self.folder)
            kept = f"after step {int(done[-1].stem.removeprefix('step-'))}" if done else "from the stage's start"
            print(f"\ninterrupted; the same command continues {kept}", flush=True)

    def save(self, trainer: pl.Trainer) -> None:
        """Every rank must call this."""
        name = f"step-{trainer.global_step:08d}.ckpt"
        final, temporary = self.folder / name, self.folder / f".{name}.tmp"
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
        trainer.strategy.barrier("before the checkpoint")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            _remove(final)
            os.replace(temporary, final)
            for old in all_checkpoints(self.folder)[: -self.keep]:
                _remove(old)
        trainer.strategy.barrier("after the checkpoint")


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; unfinished ones are not among them."""
    found = [(int(m[1]), path) for path in folder.glob("*.ckpt") if (m := PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest readable checkpoint: a file of torch.save, or DeepSpeed's folder."""
    readable = (path for path in reversed(all_checkpoints(folder)) if path.is_dir() or zipfile.is_zipfile(path))
    return next(readable, None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
