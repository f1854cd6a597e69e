"""One conversation as token ids with their kinds, turns and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmprune_train.data.records import IMAGE_PLACEHOLDER, Record
from mmprune_train.data.spans import Span
from mmprune_train.data.templates import Template
from mmprune_train.errors import UserError
from mmprune_train.packed.sequence import IGNORE, Kind


@dataclass(frozen=True)
class Example:
    """A tokenised conversation of L tokens, images expanded; labels are not shifted yet."""

    id: str
    ids: Tensor
    """[L] int64."""
    kind: Tensor
    """[L] int64, `Kind`."""
    turn: Tensor
    """[L] int64; 0: before the first question."""
    labels: Tensor
    """[L] int64: the token's own id where it is trained on, else IGNORE."""
    n_images: int
    """Images that are left after cutting to the maximum length: the first ones of the record."""
    truncated: int = 0
    """Tokens that were cut."""

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss: the first token of a sequence is never predicted."""
        return int((self.labels[1:] != IGNORE).sum())


def encode(
    record: Record, template: Template, tokenizer: PreTrainedTokenizerBase, image_tokens: int, max_length: int
) -> Example:
    """Render, tokenise as one string, and map tokens to spans by the place of their last character (of an added token:
    the last of its own text, not of the white space that it swallows).

    Every `<image>` becomes `image_tokens` visual tokens; what lies beyond `max_length` is cut. Raises UserError, with
    the sample's id, when nothing trained on is left or an image is cut in two.
    """
    try:
        spans = template.spans(record.turns)
    except UserError as error:
        raise UserError(f"{record.told}: {error}") from None
    written, owner = tokenise(spans, template)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER))
    span_kind = np.array([int(span.kind) for span in spans])
    span_turn = np.array([span.turn for span in spans])
    supervised = np.array([span.supervised for span in spans])[owner]  # [S]
    special = np.isin(written, template.rules.special)
    visual = (written == image_id) & ~supervised
    kinds = np.where(special & ~supervised, int(Kind.SPECIAL), span_kind[owner])
    kinds = np.where(visual, int(Kind.VISUAL), kinds)
    trained = np.where(supervised, written, IGNORE)

    bos = template.rules.bos
    head = len(bos)
    columns = np.stack([written, kinds, span_turn[owner], trained])  # [4, S]
    prefix = np.array([bos, [int(Kind.SPECIAL)] * head, [0] * head, [IGNORE] * head]).reshape(4, head)
    columns = np.concatenate([prefix, columns.repeat(np.where(visual, image_tokens, 1), axis=1)], axis=1)
    dense = columns.shape[1]
    ids, kind, turn, labels = torch.from_numpy(columns[:, :max_length].astype(np.int64)).unbind()
    n_images = int((kind == Kind.VISUAL).sum()) // image_tokens
    example = Example(record.id, ids, kind, turn, labels, n_images, dense - len(ids))
    _check(example, record, image_tokens, max_length, dense)
    return example


def tokenise(spans: Sequence[Span], template: Template) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the joined spans and the span of each token, both [S]."""
    text = "".join(span.text for span in spans)
    encoding = template.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    ids = np.array(encoding["input_ids"], dtype=np.int64)
    starts, stops = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    last = np.clip(stops - 1, 0, None)
    greedy = template.rules.greedy  # take spaces of the span behind them, or before them
    for place in np.flatnonzero(np.isin(ids, list(greedy))):
        content = greedy[int(ids[place])]
        found = text.find(content, starts[place], stops[place])
        last[place] = found + len(content) - 1 if found >= 0 else last[place]
    ends = np.cumsum([len(span.text) for span in spans])
    last = np.maximum.accumulate(last)  # a token of no width stays with the one before it
    return ids, np.searchsorted(ends, last, side="right")


def _check(example: Example, record: Record, image_tokens: int, max_length: int, dense: int) -> None:
    where = record.told
    need = f"its {dense} tokens exceed max_length={max_length}" if dense > max_length else f"it has {dense} tokens"
    if int((example.kind == Kind.VISUAL).sum()) % image_tokens:
        raise UserError(
            f"{where}: {need}, and the cut goes through an image of {image_tokens} tokens; "
            "raise the stage's max_length or drop an image from the sample"
        )
    if not example.supervised:
        raise UserError(
            f"{where}: {need}, and nothing that is trained on is left; "
            "raise the stage's max_length, shorten the question or drop the sample"
        )
