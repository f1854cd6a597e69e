"""Records as ready samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmprune_train.data.batch import Sample
from mmprune_train.data.encode import Example, encode
from mmprune_train.data.images import ImageReader
from mmprune_train.data.records import IMAGE_PLACEHOLDER, Record
from mmprune_train.data.templates import Template
from mmprune_train.packed.patches import Patches


class Features(Protocol):
    """What is known of images beforehand, so that they need not be read."""

    def read(self, images: Sequence[Path]) -> Patches:
        """A row for each image; of no image where there is none."""
        ...

    def kept(self, image: Path) -> int:
        """Visual tokens of an image that stage 1 keeps."""
        ...


TEMPLATE_TOKENS = 256
"""What a template adds before the first answer, at most: a system text, role markers."""


def _at_most(record: Record, image_tokens: int) -> int:
    """Tokens up to the first answer and the last image, at most: one a byte."""
    shows = [k for k, turn in enumerate(record.turns) if IMAGE_PLACEHOLDER in turn.question]
    turns = record.turns[: 1 + (shows[-1] if shows else 0)]
    text = sum(len(turn.question.encode()) + len(turn.answer.encode()) for turn in turns)
    text -= len(turns[-1].answer.encode())
    return TEMPLATE_TOKENS * len(turns) + text + len(record.images) * image_tokens


@dataclass(eq=False)
class ConversationDataset:
    """Tokenises and reads images on demand; a bad sample raises UserError with its id and is never replaced."""

    records: Sequence[Record]
    template: Template
    tokenizer: PreTrainedTokenizerBase
    reader: ImageReader
    image_tokens: int
    max_length: int
    features: Features | None = None
    """Carried by the samples instead of pixels; no image is read then."""

    def encode(self, index: int) -> Example:
        """A sample as token ids."""
        return encode(self.records[index], self.template, self.tokenizer, self.image_tokens, self.max_length)

    def check_cuts(self) -> None:
        """Raise UserError at the first sample that the template does not take, of which `max_length` leaves nothing to
        train on, or whose image it cuts in two: told before training, not in the middle of an epoch. Samples that are
        surely short enough up to their first answer and last image are not tokenised."""
        for index, record in enumerate(self.records):
            several = self.template.marks is None and len(record.turns) > 1  # which `plain` refuses
            if several or _at_most(record, self.image_tokens) > self.max_length:
                self.encode(index)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """A batch at once, so that an image that several of its samples share is read once."""
        read: dict[Path, Tensor] = {}
        samples = []
        for index in indices:
            record, example = self.records[index], self.encode(index)
            paths = record.images[: example.n_images]
            if self.features is not None:
                samples.append(Sample(example, paths, [], self.features.read(paths)))
                continue
            for path in paths:
                if path not in read:
                    read[path] = self.reader(path, record.told)
            samples.append(Sample(example, paths, [read[path] for path in paths]))
        return samples
