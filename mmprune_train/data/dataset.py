"""Records as a torch data set of ready samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mmprune_train.data.batch import Sample
from mmprune_train.data.encode import encode
from mmprune_train.data.images import ImageReader
from mmprune_train.data.records import Record
from mmprune_train.data.templates import Template
from mmprune_train.pruning.patches import Patches


class Features(Protocol):
    """What is known of images beforehand, so that they need not be read."""

    def read(self, images: Sequence[Path]) -> Patches:
        """A row for each image; of no image where there is none."""
        ...

    def kept(self, image: Path) -> int:
        """Tokens that stage 1 leaves of an image."""
        ...


class ConversationDataset(Dataset[Sample]):
    """Tokenises and reads images on demand; a bad sample raises UserError with its id and is never replaced.

    With `features` no image is read: samples carry what those hold.
    """

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        reader: ImageReader,
        image_tokens: int,
        max_length: int,
        features: Features | None = None,
    ) -> None:
        self.records = records
        self.template = template
        self.tokenizer = tokenizer
        self.reader = reader
        self.image_tokens = image_tokens
        self.max_length = max_length
        self.features = features

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """A batch at once, so that an image that several of its samples share is read once."""
        read: dict[Path, Tensor] = {}
        samples = []
        for index in indices:
            record = self.records[index]
            example = encode(record, self.template, self.tokenizer, self.image_tokens, self.max_length)
            paths = record.images[: example.n_images]
            if self.features is not None:
                samples.append(Sample(example, paths, [], self.features.read(paths)))
                continue
            for path in paths:
                if path not in read:
                    read[path] = self.reader(path, f"{record.where} (id {record.id})")
            samples.append(Sample(example, paths, [read[path] for path in paths]))
        return samples
