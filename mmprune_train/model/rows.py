"""Few different numbers of rows, for matrix products that are made anew for each.

On CPUs oneDNN computes bf16, and makes a kernel for every shape that it meets. With pruning each batch has a number of
tokens of its own, so that a training step would make a few dozen. Rows of zeros round the numbers up to few, which the
first steps have met. A row of a product depends on no other row, and a row of zeros that nothing reads has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 8
"""The least step between the numbers."""
STEPS = 32
"""Numbers between a power of two and the next where they are further apart: at most 1 / 32 of the rows is added."""


def rounded(rows: int) -> int:
    """The number of rows that so many are computed with."""
    step = max(ROWS, 2 ** (rows - 1).bit_length() // (2 * STEPS))
    return -(-rows // step) * step


def computed_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of products of tensors in `dtype`: what autocast makes of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def rounded_up(states: Tensor) -> Tensor:
    """states [R, D] with rows of zeros behind them where their product is bf16 on a CPU; elsewhere as they are."""
    if states.device.type != "cpu" or computed_in(states.device, states.dtype) != torch.bfloat16:
        return states
    return pad(states, (0, 0, 0, rounded(len(states)) - len(states)))


def by_rows(product: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """product(states) [R, D'] of states [R, D], for a product that makes each row of its own row alone."""
    return product(rounded_up(states))[: len(states)]
