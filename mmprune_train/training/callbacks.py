"""What a run tells while it runs: metrics.jsonl, the loggers, and progress."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

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
class Progress(StepWatch):
    """A bar over the stage's optimizer steps on a terminal; elsewhere one line every `every` steps."""

    stage: str
    total_steps: int
    every: int
    metrics: MetricsWriter
    began: float = 0.0
    first: int = 0
    bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.began, self.first = time.perf_counter(), trainer.global_step
        if trainer.is_global_zero and sys.stdout.isatty() and sys.stderr.isatty():
            shown = "{l_bar}{bar}| {n}/{total}{postfix}"
            self.bar = tqdm(desc=self.stage, total=self.total_steps, initial=self.first, bar_format=shown)

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step, row = trainer.global_step, self.metrics.latest
        due = self.bar is not None or step % self.every == 0 or step in (self.first + 1, self.total_steps)
        if not trainer.is_global_zero or not due:
            return
        each = (time.perf_counter() - self.began) / (step - self.first)
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        share = row["data_seconds"] / row["step_seconds"]
        waiting = f" ({100 * share:.0f} % waiting for data)" if share >= 0.05 else ""
        cut = f"{row['samples_truncated']} of {row['samples']} samples cut  " if row["samples_truncated"] else ""
        told = (
            f"loss {loss}  lr {row['lr']:.2e}  kept {row['keep_ratio']:.3f}  {each:.2f} s/step{waiting}  "
            f"MFU {row['mfu']:.2f}  {cut}{(self.total_steps - step) * each:.0f} s left"
        )
        if self.bar is None:
            print(f"{self.stage} {step}/{self.total_steps}  {told}", flush=True)
        else:
            self.bar.set_postfix_str(told, refresh=False)
            self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()
