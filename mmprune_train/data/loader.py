"""The training loader: batches of any epoch from any position, read here or in worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from mmprune_train.data.batch import Batch, Sample, collate
from mmprune_train.data.dataset import ConversationDataset, Features
from mmprune_train.data.images import ImageReader
from mmprune_train.data.records import Record
from mmprune_train.data.sampler import ResumableBatches
from mmprune_train.data.templates import Template
from mmprune_train.errors import UserError


class TrainLoader:
    """Holds no position: (epoch, start) is all, so a resumed run asks for where it was and gets the same batches."""

    def __init__(
        self, dataset: ConversationDataset, batches: ResumableBatches, num_workers: int = 0, pin: bool = False
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.num_workers = num_workers
        self.pin = pin
        if num_workers:  # set before the fork, or the tokenizers library warns in every worker
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... of an epoch. Raises UserError for a bad sample, also from a worker."""
        loader = DataLoader(
            _Reporting(self.dataset),
            batch_sampler=self.batches.epoch(epoch, start),
            collate_fn=_collate,
            num_workers=self.num_workers,
            pin_memory=self.pin,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def train_loader(
    records: Sequence[Record],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    reader: ImageReader,
    image_tokens: int,
    max_length: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    group_by_modality: bool = False,
    samples_per_image: int = 1,
    features: Features | None = None,
) -> TrainLoader:
    """Batches of `batch_size` records for one rank; see ResumableBatches for the order and ConversationDataset for the
    rest. `samples_per_image` > 1 keeps that many samples of one image in one batch."""
    return TrainLoader(
        ConversationDataset(records, template, tokenizer, reader, image_tokens, max_length, features),
        ResumableBatches(
            len(records),
            batch_size,
            seed,
            rank,
            world,
            modality=[bool(record.images) for record in records] if group_by_modality else None,
            images=[tuple(record.images) or None for record in records],
            samples_per_image=samples_per_image,
        ),
        num_workers,
        pin=torch.cuda.is_available(),
    )


class _Reporting(Dataset[Sample]):
    """Hands a UserError on as a value: raised in a worker it would arrive wrapped in a traceback."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample] | UserError:
        try:
            return self.dataset.__getitems__(indices)
        except UserError as error:
            return error


def _collate(samples: Sequence[Sample] | UserError) -> Batch | UserError:
    return samples if isinstance(samples, UserError) else collate(samples)
