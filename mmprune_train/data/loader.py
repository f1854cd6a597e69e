"""The training loader: micro-batches of any optimizer steps, read here or in worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from mmprune_train.data.batch import Batch, collate
from mmprune_train.data.dataset import ConversationDataset, Features
from mmprune_train.data.images import ImageReader
from mmprune_train.data.lengths import KeptTokens, SampleLengths, VisualTokens
from mmprune_train.data.packing import EvenSplit, Split, TokenSplit
from mmprune_train.data.records import Record
from mmprune_train.data.sampler import GlobalBatches
from mmprune_train.data.templates import Template
from mmprune_train.errors import UserError


@dataclass
class TrainLoader:
    """Micro-batches of one rank. Holds no position: a resumed run asks for the step where it was."""

    dataset: ConversationDataset
    batches: GlobalBatches
    split: Split
    """Of a step's samples into micro-batches."""
    rank: int = 0
    world: int = 1
    num_workers: int = 0
    kept: KeptTokens | None = None
    """The estimate that `split` plans with, to be told what training sees; None: it needs none."""

    def __post_init__(self) -> None:
        self.most = self.batches.size // self.world
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
        loader = DataLoader(
            _Batches(self.dataset),
            batch_sampler=planned(),
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_outlive_signals,
            prefetch_factor=ahead if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        micro_batches = map(_checked, loader)
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
    max_length: int,
    batch_size: int,
    global_batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    group_by_modality: bool = False,
    samples_per_image: int = 1,
    token_budget: int | None = None,
    visual_tokens: VisualTokens | None = None,
    features: Features | None = None,
) -> TrainLoader:
    """Micro-batches of one rank; see GlobalBatches for the order and ConversationDataset for the rest.

    Args:
        batch_size: samples of a micro-batch, where there is no `token_budget`.
        global_batch_size: samples of an optimizer step over all ranks; a multiple of batch_size x world, or, with a
            budget, of `world`.
        samples_per_image: up to so many samples of one image are kept in one micro-batch.
        token_budget: tokens that a micro-batch lets into the LLM, see TokenSplit.
        visual_tokens: how many of them an image has; None: that is estimated while training.
        features: of all images, where the feature cache is on.
    """
    dataset = ConversationDataset(records, template, tokenizer, reader, image_tokens, max_length, features)
    batches = GlobalBatches(
        len(records),
        global_batch_size,
        seed,
        modality=[bool(record.images) for record in records] if group_by_modality else None,
        images=[tuple(record.images) or None for record in records],
        samples_per_image=samples_per_image,
    )
    if token_budget is None:
        return TrainLoader(dataset, batches, EvenSplit(batches, batch_size), rank, world, num_workers)
    kept = KeptTokens(image_tokens) if visual_tokens is None else None
    split = TokenSplit(batches, SampleLengths(dataset, visual_tokens), token_budget, world, kept)
    if token_budget < max_length:  # else every sample fits
        if rank == 0:
            print(f"token_budget={token_budget} < max_length={max_length}: reading {len(records)} lengths", flush=True)
        split.check()
    return TrainLoader(dataset, batches, split, rank, world, num_workers, kept)


@dataclass(eq=False)
class _Batches(Dataset[Any]):
    """Hands a UserError on as a value: raised in a worker it would arrive wrapped in a traceback."""

    samples: ConversationDataset

    def __getitems__(self, indices: Sequence[int]) -> Batch | UserError:
        try:
            return collate(self.samples.__getitems__(indices))
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _checked(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _outlive_signals(worker: int) -> None:
    """Keep a reader alive until its parent ends it: Slurm and torchrun send what asks a run to save and end to all its
    processes, and the running step still needs data."""
    for each in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which has neither of the two
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
