"""The llava-hf processor's padded batch as a packed sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.packed.host import fetch, take
from mmprune_train.pruning import IGNORE, Kind, PackedSequence

Annotate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids of one sample [L] -> kinds [L] and turns [L]."""


def pack(
    input_ids: Tensor,
    valid: Tensor,
    images: int,
    image_token: int,
    labels: Tensor | None = None,
    annotate: Annotate | None = None,
    *,
    features: int,
) -> PackedSequence:
    """Leave out the padding and name each token's sample, image and patch. All on the host.

    Args:
        input_ids: [B, L], every image as its full number of image tokens.
        valid: [B, L] bool, False at padding.
        images: how many images there are, in the order of their tokens.
        image_token: id that stands for one patch.
        labels: [B, L] ids to predict, IGNORE elsewhere (not shifted); None: no targets.
        annotate: kinds and turns of a sample's tokens; None: all text is the first turn's prompt.
        features: what the model's encoder makes of one image, each with an image token of its own.
    Raises:
        UserError: image tokens and images do not match.
    """
    segment = torch.arange(input_ids.shape[0])[:, None].expand_as(input_ids)[valid]
    ids = input_ids[valid]
    visual = ids == image_token
    tokens = int(visual.sum())
    if tokens and not images:
        raise UserError(f"input_ids has {tokens} image tokens, but there are no pixel_values: pass the images, too")
    if tokens != images * features:
        raise UserError(
            f"{tokens} image tokens in input_ids do not match {images * features} image features, {features} of each "
            f"of {images} images in pixel_values; make both with one call of the model's processor"
        )
    cut = torch.bincount(segment[visual], minlength=1) % features if images else visual.new_zeros(1)
    if bool(cut.any()):
        raise UserError(
            f"sample {int(cut.nonzero()[0])} of input_ids holds only a part of an image's {features} image tokens; do "
            "not cut texts after the processor has written them"
        )
    count = visual.cumsum(0) - 1
    image = torch.where(visual, count // features, -1)
    patch = torch.where(visual, count % features, -1)
    kind = torch.where(visual, Kind.VISUAL, Kind.PROMPT)
    turn = torch.ones_like(ids)
    if annotate is not None:
        parts = [annotate(part) for part in ids.split(valid.sum(1).tolist())]
        kind, turn = (torch.cat(fields) for fields in zip(*parts, strict=True))
    target = torch.full_like(ids, IGNORE)
    if labels is not None:
        label = labels[valid]
        target[:-1] = torch.where(segment[1:] == segment[:-1], label[1:], IGNORE)
    slot = torch.arange(len(ids))
    sequence = PackedSequence(ids, slot, segment, kind, image, patch, turn, target, slot, input_ids.shape[0])
    return replace(sequence, position=sequence.within())


def first_of_equal(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Several questions about one image, or several beams, need it encoded once.

    Args:
        pixel_values: [I, 3, H, W].
    Returns:
        The images that differ from the one before them [J, 3, H, W], and for every image its row among them [I], on the
        host.
    """
    new = torch.ones(len(pixel_values), dtype=torch.bool)
    new[1:] = fetch((pixel_values[1:] != pixel_values[:-1]).flatten(1).any(1))
    return take(pixel_values, new.nonzero().squeeze(1)), new.cumsum(0) - 1
