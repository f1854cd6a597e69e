"""What a run tells while it runs: metrics.jsonl, the loggers, and progress."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from mmprune_train.storage.files import json_text
from mmprune_train.storage.run_files import keep_steps
from mmprune_train.training.module import MultimodalModule
from mmprune_train.training.stream import BatchStream


class StepWatch(pl.Callback):
    """Base: calls `on_step_end` once an optimizer step, after its last micro-batch."""

    seen: int = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.seen:
            self.seen = trainer.global_step
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class MetricsWriter(StepWatch):
    """Writes one line of metrics.jsonl an optimizer step, and hands it to the loggers and to the progress callback."""

    path: Path
    """The stage's metrics.jsonl."""
    stream: BatchStream
    """Tells the epoch and the seconds spent waiting for data, and is told what images left."""
    peak_tflops: float
    """Of one device, for the MFU."""
    latest: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_steps(self.path, trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.place.first:
            self.began = time.perf_counter()

    def on_step_end(self, trainer: pl.Trainer, pl_module: MultimodalModule) -> None:
        measured = pl_module.step_metrics()
        waited = self.stream.take_waited()
        seconds = time.perf_counter() - self.began + waited
        flops = measured.pop("flops")
        tflops = flops / 1e12 / seconds / trainer.world_size
        self.stream.learn(measured.pop("images"))
        row = {
            "step": trainer.global_step,
            "epoch": round(self.stream.epochs_done, 4),
            **measured,
            "step_seconds": seconds,
            "data_seconds": waited,
            "samples_per_second": measured["samples"] / seconds,
            "tflops": tflops,
            "mfu": tflops / self.peak_tflops,
        }
        self.latest = row
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(row) + "\n")
        logged = {k: math.nan if v is None else v for k, v in row.items() if k != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=row["step"])


@dataclass(eq=False)
class PlainProgress(StepWatch):
    """One line every `every` steps, where there is no terminal to draw a bar on."""

    stage: str
    total_steps: int
    every: int
    metrics: MetricsWriter
    began: float = 0.0
    first: int = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.began, self.first = time.perf_counter(), trainer.global_step

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and (step % self.every == 0 or step in (self.first + 1, self.total_steps)):
            row = self.metrics.latest
            each = (time.perf_counter() - self.began) / (step - self.first)
            print(
                f"{self.stage} {step}/{self.total_steps}  loss {loss_of(row)}  lr {row['lr']:.2e}  "
                f"kept {row['keep_ratio']:.3f}  {each:.2f} s/step{waiting(row)}  MFU {row['mfu']:.2f}  "
                f"{cut(row)}{(self.total_steps - step) * each:.0f} s left",
                flush=True,
            )


def loss_of(row: dict[str, Any]) -> str:
    return "not finite" if row["loss"] is None else f"{row['loss']:.4f}"


def waiting(row: dict[str, Any]) -> str:
    """The step's share of waiting for data, where it is worth a word."""
    share = row["data_seconds"] / row["step_seconds"]
    return f" ({100 * share:.0f} % waiting for data)" if share >= 0.05 else ""


def cut(row: dict[str, Any]) -> str:
    """Samples of the step that `max_length` cut, where there are any."""
    return f"{row['samples_truncated']} of {row['samples']} samples cut  " if row["samples_truncated"] else ""


class StepBar(TQDMProgressBar):
    """Lightning's bar over the stage's optimizer steps, with the latest one's loss and share of tokens kept."""

    def __init__(self, stage: str, total_steps: int, metrics: MetricsWriter) -> None:
        super().__init__(refresh_rate=1)
        self.stage = stage
        self.total_steps = total_steps
        self.metrics = metrics

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        row = self.metrics.latest
        if not row:
            return {}
        wait = f"{row['data_seconds'] / row['step_seconds']:.0%}"
        return {
            "loss": loss_of(row), "kept": f"{row['keep_ratio']:.3f}", "mfu": f"{row['mfu']:.2f}",
            "data": wait, "step": row["step"],
        }  # fmt: skip

    @property
    def total_train_batches(self) -> int:
        return self.total_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.place.last:  # the bar counts from 0
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch.place.step)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self.stage)


def progress(stage: str, total_steps: int, every: int, metrics: MetricsWriter) -> pl.Callback:
    """A bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        return StepBar(stage, total_steps, metrics)
    return PlainProgress(stage, total_steps, every, metrics)
