"""The border between the host and the device, and the only ways across it inside a step.

Which tokens there are is written on the host, in small integer tensors: that costs the device nothing and makes nobody
wait. What tokens are worth, and their states, live on the device. A pruning stage asks the device once.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor


def fetch(tensor: Tensor) -> Tensor:
    """The tensor on the host, without gradient. The one call inside a step that waits for the device."""
    return tensor.detach().cpu()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting: from pinned memory, in the order of the device's work."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def take(values: Shaped[Tensor, "T ..."], rows: Int64[Tensor, " R"]) -> Shaped[Tensor, "R ..."]:
    """Rows, numbered on the host, of values that may lie on the device."""
    return values.index_select(0, upload(rows, values.device))
