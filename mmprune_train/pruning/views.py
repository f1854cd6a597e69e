"""Views: what a score may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mmprune_train.packed.sequence import PackedSequence
from mmprune_train.pruning.turns import QueryGroups

Part = TypeVar("Part")


def full_precision(like: Tensor) -> torch.autocast:
    """No autocast: a score in bf16 has 8 bits, which ties tokens and moves knees."""
    return torch.autocast(like.device.type, enabled=False)


@dataclass
class VisionView:
    """What a stage-1 score may look at. `I` images, `N` patches, `D` width, `H` heads of width `d`.

    The callables compute when called, so that a score pays for what it reads alone. Each gives one query row an image:
    no N x N matrix is ever formed.
    """

    patches: Float[Tensor, "I N D"]
    """[I, N, D] hidden states of the patches at the feature layer, in raster order."""
    grid: tuple[int, int]
    """Rows and columns of patches; N is their product."""
    patch_keys: Callable[[], Tensor]
    """Recomputes the patches' keys [I, N, D] in the chosen block, all heads side by side."""
    cls: Float[Tensor, "I D"] | None = None
    """[I, D] hidden state of the CLS token at the feature layer, where the encoder has one."""
    cls_feature: Float[Tensor, "I E"] | None = None
    """[I, E] what the projector would read of the CLS token, with its gradient; None without CLS."""
    cls_query_keys: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Recomputes, in the chosen block, the CLS row's query [I, D] and the keys [I, 1 + N, D] of CLS and patches, all
    heads side by side and unscaled; None without CLS."""
    probe_query_keys: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Runs the layers after the feature layer and gives the attention pooling head's query [I, D] and the patches'
    keys [I, N, D], as above; None without such a head."""
    block_output: Callable[[], Tensor] | None = None
    """The patches [I, N, D] as the chosen block puts them out; None: not known."""
    question: Callable[[bool], tuple[Tensor, Tensor]] | None = None
    """Puts patches [I, N, E] and the image's question [I, E] where CLIP compares images with texts; the argument says
    whether the encoder's last norm comes before the projection. An image without a question has zeros for one. None
    without a text tower."""
    words: Float[Tensor, "I W P"] | None = None
    """[I, W, P] the LLM's embeddings of the words of each image's question, zeros behind the last; None: not read."""
    block: Callable[[int | float], VisionView] | None = None
    """The same images with another block of the encoder as the chosen one; None: it is the only one there is."""
    asked: Bool[Tensor, " I"] | None = None
    """[I] which images have a question, where one is read."""
    weights: nn.Module | None = None
    """What the score's declaration makes, where it has weights; trained with the network."""
    heads: int = 1
    """H, of the encoder's attention."""
    encoder: str = "this encoder"
    """Name for error messages."""

    def at(self, rows: Int64[Tensor, " P"]) -> VisionView:
        """The view of images `rows`, each as often as it is named."""
        changed: dict[str, Any] = {name: part[rows] for name, part in vars(self).items() if isinstance(part, Tensor)}
        computed = {name: part for name, part in vars(self).items() if callable(part) and name != "weights"}
        changed |= {name: partial(_rows_of, part, rows) for name, part in computed.items()}
        return replace(self, **changed)


def _rows_of(compute: Callable[..., Any], rows: Tensor, *arguments: Any) -> Any:
    """Rows of the tensor, of each tensor, or of the view that a view's callable gives."""
    found = compute(*arguments)
    if isinstance(found, VisionView):
        return found.at(rows)
    return tuple(tensor[rows] for tensor in found) if isinstance(found, tuple) else found[rows]


def given(part: Part | None) -> Part:
    """What a score reads of a view; that an encoder has it is known before the score is called."""
    assert part is not None
    return part


@dataclass
class LanguageView:
    """What a stage-2 score may look at, before the layer that will see the short sequence."""

    sequence: PackedSequence
    """On the host; `packed.host` has what brings its fields, and rows numbered by them, to the states' device."""
    hidden: Float[Tensor, "T D"]
    """[T, D] hidden states entering the layer."""
    query_keys: Callable[[Tensor], tuple[Tensor, Tensor]]
    """rows [R], on the host -> queries [R, H, d] of those tokens, scaled, and keys [T, Hkv, d] of all: the layer's own
    norm, projections (biases, q/k norms, adapters) and rotary embedding."""
    groups: QueryGroups
    """The query tokens, on the host."""
    normed: Float[Tensor, "T D"] | None = None
    """[T, D] the same states after the LLM's last norm, where something reads them."""
