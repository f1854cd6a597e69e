"""The training loader: micro-batches of any optimizer steps, read here or in worker processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from mmprune_train.config.schema import StageConfig
from mmprune_train.data.batch import Batch, collate
from mmprune_train.data.dataset import ConversationDataset, Features
from mmprune_train.data.images import ImageReader
from mmprune_train.data.lengths import KeptTokens, SampleLengths, VisualTokens
from mmprune_train.data.packing import EvenSplit, Split, TokenSplit
from mmprune_train.data.records import Record
from mmprune_train.data.sampler import GlobalBatches
from mmprune_train.data.templates import Template
from mmprune_train.workers import read_by_workers


@dataclass(eq=False)
class TrainLoader:
    """Micro-batches of one rank. Holds no position: a resumed run asks for the step where it was."""

    dataset: ConversationDataset
    batches: GlobalBatches
    split: Split
    """Of a step's samples into micro-batches."""
    rank: int = 0
    world: int = 1
    num_workers: int = 0
    pin: bool = False
    kept: KeptTokens | None = None
    """The estimate that `split` plans with, to be told what training sees; None: it needs none."""

    def __post_init__(self) -> None:
        self.most = self.batches.size // self.world
        """Micro-batches that an optimizer step may have."""
        if self.num_workers:  # set before the fork, or the tokenizers library warns in every worker
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def epochs(self, steps: int) -> float:
        """Epochs that so many optimizer steps take."""
        return steps * self.batches.size / self.batches.n

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the optimizer steps start .. stop - 1, equally many on every rank.

        Raises UserError for a bad sample, also from a worker.
        """
        counts: deque[int] = deque()

        def planned() -> Iterator[list[int]]:
            for step in range(start, stop):
                mine = self.split(step)[self.rank :: self.world]
                counts.append(len(mine))
                yield from mine

        workers, ahead = self._workers()
        micro_batches = read_by_workers(partial(_batch, self.dataset), planned(), workers, ahead, self.pin)
        for first in micro_batches:
            yield [first, *islice(micro_batches, counts.popleft() - 1)]

    def _workers(self) -> tuple[int, int]:
        """Workers, and how many micro-batches each reads ahead: together no further than an estimate lags behind."""
        if self.kept is None:
            return self.num_workers, 2
        workers = min(self.num_workers, self.kept.lag)
        return workers, min(2, self.kept.lag // max(1, workers))


def train_loader(
    records: Sequence[Record],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    reader: ImageReader,
    image_tokens: int,
    stage: StageConfig,
    seed: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    visual_tokens: VisualTokens | None = None,
    features: Features | None = None,
) -> TrainLoader:
    """Micro-batches of one rank; see GlobalBatches for the order and ConversationDataset for the rest.

    Args:
        stage: sizes of a batch; `global_batch_size` is a multiple of batch_size x world, or, with a token budget, of
            `world`.
        visual_tokens: tokens that an image lets into the LLM, for that budget; None: estimated while training.
        features: of all images, where the feature cache is on.
    """
    dataset = ConversationDataset(records, template, tokenizer, reader, image_tokens, stage.max_length, features)
    batches = GlobalBatches(
        len(records),
        stage.global_batch_size,
        seed,
        modality=[bool(record.images) for record in records] if stage.group_by_modality else None,
        images=[tuple(record.images) or None for record in records],
        samples_per_image=stage.samples_per_image,
    )
    pin = torch.cuda.is_available()
    if (token_budget := stage.token_budget) is None:
        return TrainLoader(dataset, batches, EvenSplit(batches, stage.batch_size), rank, world, num_workers, pin)
    kept = KeptTokens(image_tokens) if visual_tokens is None else None
    split = TokenSplit(batches, SampleLengths(dataset, visual_tokens), token_budget, world, kept)
    if token_budget < stage.max_length:  # else every sample fits
        if rank == 0:
            below = f"token_budget={token_budget} < max_length={stage.max_length}"
            print(f"{below}: reading {len(records)} lengths", flush=True)
        split.check()
    return TrainLoader(dataset, batches, split, rank, world, num_workers, pin, kept)


def _batch(dataset: ConversationDataset, indices: Sequence[int]) -> Batch:
    return collate(dataset.read(indices))
