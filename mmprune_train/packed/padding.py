"""Ragged groups as padded rows, and back."""

from __future__ import annotations

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from mmprune_train.packed.host import take, upload


def columns(group: Int64[Tensor, " M"], groups: int) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " G"]]:
    """Place each entry of a sorted ragged list in a padded table.

    Args:
        group: [M] group of each entry, non-decreasing, 0..groups-1.
    Returns:
        column [M] of each entry inside its group, and lengths [groups]; on the host, as `group` is.
    """
    lengths = torch.bincount(group, minlength=groups)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(len(group)) - starts[group], lengths


def pad(
    values: Shaped[Tensor, "M ..."], group: Int64[Tensor, " M"], groups: int
) -> tuple[Shaped[Tensor, "G W ..."], Int64[Tensor, " G"]]:
    """Rows of a ragged list, padded with zeros: values [M, ...] -> [groups, longest, ...], and lengths [groups].

    `group` and the lengths are on the host, the values wherever they are.
    """
    column, lengths = columns(group, groups)
    width = int(lengths.max()) if len(group) else 0
    place = upload(group * width + column, values.device)
    rest = values.shape[1:]
    return values.new_zeros((groups * width, *rest)).index_copy(0, place, values).view(groups, width, *rest), lengths


def unpad(table: Shaped[Tensor, "G W ..."], group: Int64[Tensor, " M"]) -> Shaped[Tensor, "M ..."]:
    """The ragged list [M, ...] whose rows `pad` made a table of."""
    column, _ = columns(group, table.shape[0])
    return take(table.flatten(0, 1), group * table.shape[1] + column)
