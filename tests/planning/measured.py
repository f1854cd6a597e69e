"""The memory of a real pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mmprune_train.benchmark.counters import peak_memory
from mmprune_train.model.flops import PassShape
from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning import PackedSequence


def peak_of_pass(
    model: PackedLlava, sequence: PackedSequence, pixels: Tensor | None, dtype: torch.dtype = torch.float32
) -> tuple[int, PassShape]:
    """Peak bytes of a forward and backward pass above what was there before, and the shape of the pass. In bf16 the
    forward pass runs under autocast, as it does in training."""
    with peak_memory("cpu") as peak:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model.forward_packed(sequence, pixels)
        shape = PassShape.of(output.trace, output.trace.encoded, int(output.supervised))
        loss = output.loss_sum
        del output
        loss.backward()
    return peak.bytes, shape
