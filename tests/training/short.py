"""A short training of a tiny model on packed batches made in the test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytorch_lightning as pl
import torch
from tiny import IMAGE_TOKEN, PATCHES, SIDE, VOCAB, tiny_llava

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import OptimConfig, StageConfig
from mmprune_train.data.batch import Batch, Sample, collate
from mmprune_train.data.encode import Example
from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning import IGNORE, Kind, Pruner
from mmprune_train.quiet import quiet
from mmprune_train.training.callbacks import MetricsWriter
from mmprune_train.training.freezing import freeze
from mmprune_train.training.module import MultimodalModule
from mmprune_train.training.stream import BatchStream


def sample(number: int) -> Sample:
    """One image, a question and an answer whose length varies from sample to sample."""
    generator = torch.Generator().manual_seed(number)
    answer = 1 + 3 * (number % 4)
    words = torch.randint(4, VOCAB, (4 + answer,), generator=generator)
    ids = torch.cat([torch.tensor([1]), torch.full((PATCHES,), IMAGE_TOKEN), words])
    kinds = [Kind.SPECIAL] + [Kind.VISUAL] * PATCHES + [Kind.PROMPT] * 4 + [Kind.ANSWER] * answer
    kind = torch.tensor([int(k) for k in kinds])
    labels = torch.where(kind == Kind.ANSWER, ids, IGNORE)
    example = Example(str(number), ids, kind, torch.ones_like(ids), labels, n_images=1)
    return Sample(example, [Path(f"{number}.png")], [torch.randn((3, SIDE, SIDE), generator=generator)])


class Loader:
    """Sixteen samples, in order, in micro-batches of given sizes: those of an optimizer step; several such in turn."""

    kept = None

    def __init__(self, *sizes: int, then: Sequence[Sequence[int]] = ()) -> None:
        """Args:
        then: sizes in the steps that follow, as many samples in all.
        """
        self.sizes = (sizes, *then)
        self.most = max(map(len, self.sizes))

    def epochs(self, steps: int) -> float:
        return steps * sum(self.sizes[0]) / 16

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """The micro-batches `start`, ... of the first size, once over the samples."""
        size = self.sizes[0][0]
        for number in range(start, 16 // size):
            yield self.batch(number * size, size)

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        for step in range(start, stop):
            sizes = self.sizes[step % len(self.sizes)]
            begins = accumulate(sizes[:-1], initial=step * sum(sizes))
            yield [self.batch(first, size) for first, size in zip(begins, sizes, strict=True)]

    @staticmethod
    def batch(first: int, size: int) -> Batch:
        return collate([sample((first + i) % 16) for i in range(size)])


def fit(
    folder: Path,
    batch_size: int,
    window: int,
    pruner: object = "none",
    steps: int = 3,
    seed: int = 7,
    token_budget: int | None = None,
    loader: Loader | None = None,
) -> tuple[list[dict], PackedLlava]:
    """Train for some steps of `window` micro-batches, or those of `loader`: rows of metrics.jsonl, and the model."""
    model = PackedLlava(tiny_llava(), Pruner(load_pruner(pruner)))
    parts = freeze(model, StageConfig(train_projector=True, train_llm=True, lr=1e-3), adapters=False)
    stream = BatchStream(loader or Loader(*[batch_size] * window), steps)
    optim = OptimConfig(eps=1e-3, warmup_ratio=0.0)
    module = MultimodalModule("instruct", model, parts, optim, steps, seed, token_budget)
    with quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            default_root_dir=folder,
        )
        trainer.callbacks += [MetricsWriter(folder / "metrics.jsonl", stream, peak_tflops=2.5)]
        trainer.fit(module, train_dataloaders=stream)
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()], model
