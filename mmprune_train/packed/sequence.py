"""The packed sequence: all samples of a batch as one row of tokens, and the one way to drop any of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.packed.host import take

IGNORE = -100
"""Target of a token whose successor is not trained on."""


class Kind(IntEnum):
    """What a token is; decides whether it may be dropped and whether it may score others."""

    VISUAL = 0
    PROMPT = 1
    """System or question text."""
    ANSWER = 2
    """Text the model writes: never dropped, never a query token."""
    SPECIAL = 3
    """BOS and other special tokens, role markers: never dropped."""


@dataclass
class PackedSequence:
    """All tokens of a batch in one row, samples one after the other.

    It lives on the host, where asking for a length or dropping a token makes nobody wait for the device; only the
    embeddings may lie there. Every tensor field has T entries along its first dimension and is selected by `keep`;
    `samples` is the number of segments. The target of a token is the id of the token that follows it where that one is
    trained on, else IGNORE: labels are shifted here, before anything is dropped.
    """

    ids: Int64[Tensor, " T"]
    """[T] token ids; the image token's id at visual tokens."""
    position: Int64[Tensor, " T"]
    """[T] position ids for the rotary embedding."""
    segment: Int64[Tensor, " T"]
    """[T] sample of the batch, non-decreasing, 0..samples-1."""
    kind: Int64[Tensor, " T"]
    """[T] `Kind`."""
    image: Int64[Tensor, " T"]
    """[T] row of `pixel_values` a visual token comes from, else -1. Samples may share an image."""
    patch: Int64[Tensor, " T"]
    """[T] raster index of the visual token's patch in its image, else -1."""
    turn: Int64[Tensor, " T"]
    """[T] 0: before the first question (BOS, system text); k: the k-th question and its answer."""
    target: Int64[Tensor, " T"]
    """[T] next-token target or IGNORE."""
    slot: Int64[Tensor, " T"]
    """[T] index in the dense packed sequence this one was cut from."""
    samples: int
    embeddings: Float[Tensor, "T D"] | None = None
    """[T, D] hidden states, absent until embedded."""
    entry: Int64[Tensor, " T"] | None = None
    """[T] index inside the sample when it entered the LLM, absent before."""
    query: Bool[Tensor, " T"] | None = None
    """[T] question tokens that may score the others; absent: all."""
    picture: Int64[Tensor, " T"] | None = None
    """[T] number of the image by where it stands in the batch, also of one that is shown twice. Counted where the
    sequence is made, with every image whole; means nothing at tokens that are not visual."""

    def __post_init__(self) -> None:
        if self.picture is None:
            self.picture = ((self.visual & (self.patch == 0)).cumsum(0) - 1).clamp(min=0)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> Int64[Tensor, " B"]:
        """[samples] tokens of each sample."""
        return torch.bincount(self.segment, minlength=self.samples)

    @property
    def cu_seqlens(self) -> Tensor:
        """[samples + 1] int32 borders of the samples, as FlashAttention's varlen kernels take them."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def visual(self) -> Bool[Tensor, " T"]:
        """[T] bool, the visual tokens."""
        return self.kind == Kind.VISUAL

    def within(self) -> Int64[Tensor, " T"]:
        """[T] index of each token inside its sample."""
        starts = self.lengths.cumsum(0) - self.lengths  # [samples]
        return torch.arange(len(self)) - starts[self.segment]

    def entries(self, lengths: list[int]) -> list[Int64[Tensor, " L"]]:
        """Per sample of these `lengths`, the places at which its tokens entered the LLM."""
        assert self.entry is not None, "the sequence has not entered the LLM"
        return list(self.entry.split(lengths))

    def keep(self, mask: Bool[Tensor, " T"]) -> PackedSequence:
        """Select the tokens where `mask` [T] is true, every field at once.

        A dropped token's target moves to the nearest kept token before it: the last patch of an image that precedes
        trained text hands its target to the last patch that stays.
        """
        order = torch.arange(len(self))
        heir = torch.where(mask, order, -1).cummax(0).values  # [T] nearest kept token at or before each
        orphan = ~mask & (self.target != IGNORE)
        target = self.target.clone()
        target[heir[orphan]] = self.target[orphan]
        chosen = mask.nonzero().squeeze(1)
        whole = replace(self, target=target)
        held = {part.name: getattr(whole, part.name) for part in fields(self)}
        taken: dict[str, Any] = {name: take(v, chosen) for name, v in held.items() if isinstance(v, Tensor)}
        return replace(whole, **taken)

    def to_the_end_of_images(self, tokens: Bool[Tensor, " T"]) -> Int64[Tensor, " T"]:
        """[T] the order in which some visual tokens stand behind the others of their image."""
        assert self.picture is not None
        place = torch.arange(len(self))
        end = torch.zeros(int(self.picture.max()) + 1, dtype=torch.long)
        end = end.scatter_reduce(0, self.picture, place * self.visual, "amax")  # of each image
        return torch.where(tokens, 2 * end[self.picture] + 1, 2 * place).sort(stable=True).indices

    def reordered(self, order: Int64[Tensor, " T"]) -> PackedSequence:
        """The tokens in another order inside their samples. What is predicted at a place stays there."""
        held = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "target"}
        taken: dict[str, Any] = {name: take(v, order) for name, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **taken)

    def keep_with(
        self, mask: Bool[Tensor, " T"], states: Float[Tensor, "T D"]
    ) -> tuple[PackedSequence, Float[Tensor, "T2 D"]]:
        """`keep`, with the tokens' hidden states [T, D] selected beside the fields."""
        kept = replace(self, embeddings=states).keep(mask)
        assert kept.embeddings is not None
        return replace(kept, embeddings=None), kept.embeddings
