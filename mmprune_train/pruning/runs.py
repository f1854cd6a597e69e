"""Average pooling inside the LLM: each image's visual tokens, in their order, become fewer, each the mean of a run.

A baseline that chooses nothing: what is dropped stays in the mean. Gradients flow through the states alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.components.declare import language_merge, language_score, language_selection
from mmprune_train.packed.host import take, upload
from mmprune_train.packed.padding import columns
from mmprune_train.pruning.views import LanguageView


@language_score(signed=True)
def early_first(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] minus the token's place in its sample: looks at nothing and costs nothing, for parts that read no score."""
    return upload(-view.sequence.within().float(), view.hidden.device)


@language_selection()
def first_of_runs(
    scores: Float[Tensor, " T"],
    counts: Int64[Tensor, " G"],
    view: LanguageView,
    places: Int64[Tensor, " M"],
    row: Int64[Tensor, " M"],
) -> Bool[Tensor, " M"]:
    """Cut each row into as many runs of neighbours as its count says, their lengths at most one apart: the first token
    of each stays. Scores are not looked at."""
    column, lengths = columns(row, len(counts))
    count, length = counts[upload(row, counts.device)], upload(lengths[row], counts.device)
    column = upload(column, counts.device)
    return column * count // length != (column - 1) * count // length


@language_merge()
def mean_of_runs(
    hidden: Float[Tensor, "T D"],
    places: Int64[Tensor, " M"],
    row: Int64[Tensor, " M"],
    dropped: Bool[Tensor, " M"],
    scores: Float[Tensor, " M"],
    picture: Int64[Tensor, " M"],
) -> tuple[Float[Tensor, "T D"], Bool[Tensor, " M"]]:
    """Each kept token becomes the mean of itself and the dropped ones behind it, up to the next kept one of its image;
    dropped ones before an image's first kept token join that one. Behind `first_of_runs` this is average pooling.

    Args:
        picture: [M] the image of each, not falling, on the host.
    """
    _, image, sizes = picture.unique_consecutive(return_inverse=True, return_counts=True)
    first = upload((sizes.cumsum(0) - sizes)[image], hidden.device)
    last = upload((sizes.cumsum(0) - 1)[image], hidden.device)
    kept = ~dropped
    number = kept.long().cumsum(0)  # [M] kept tokens up to here
    before = (number - kept.long())[first]
    run = number.maximum(before + 1)  # [M] from 1
    joins = (number[last] > before).float()  # an image that keeps nothing leaves nothing
    states = take(hidden, places)
    total = states.new_zeros((len(run) + 2, states.shape[1]), dtype=torch.float32)
    total = total.index_add(0, run, states.float() * joins[:, None])
    members = joins.new_zeros(len(run) + 2).index_add(0, run, joins).clamp(min=1)
    mean = (total / members[:, None])[run].to(hidden.dtype)
    made = torch.where(kept[:, None], mean, states)
    return hidden.index_copy(0, upload(places, hidden.device), made), torch.zeros_like(dropped)
