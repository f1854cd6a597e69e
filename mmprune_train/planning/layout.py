"""What a strategy keeps of weights, gradients and optimizer state on each device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mmprune_train.devices import GIB
from mmprune_train.model.quantize import BYTES as FOUR_BITS
from mmprune_train.planning.probe import Numerics

ADAM = 8
"""Bytes a trained parameter of AdamW's two moments, fp32."""
MASTER = 4
"""Bytes of DeepSpeed's fp32 copy of a trained parameter."""
BUCKET = 200_000_000
"""Gradients that Lightning lets ZeRO-2 and ZeRO-3 collect before they are reduced, entries."""
GATHERED = 1_000_000_000
"""Parameters that ZeRO-3 holds whole at once, DeepSpeed's default."""
CUDA_OVERHEAD = 1.5 * GIB
"""Of the driver's context, libraries and communication buffers on each GPU: a rule of thumb."""
FRAGMENTED = 0.05
"""Share of the activations that an allocator wastes: a rule of thumb."""


@dataclass(frozen=True)
class Layout:
    """What a strategy shards, copies and offloads."""

    engine: bool = False
    """DeepSpeed's: weights in the compute dtype, a master copy in the optimizer."""
    shards: int = 0
    """ZeRO's stage: of what each device keeps its part alone; 1: the optimizer, 2: gradients, too, 3: weights, too."""
    buckets: bool = False
    """DDP's copies of the gradients, in which they are reduced."""
    layered: bool = False
    """FSDP2's: weights and gradients in fp32, gathered layer by layer in the compute dtype."""
    offloads: bool = False
    """Whether the optimizer, and the gradients that it reads, are in the host's memory, and weights where they are
    sharded."""


LAYOUTS = {
    "single": Layout(),
    "ddp": Layout(buckets=True),
    **{f"deepspeed_zero{stage}": Layout(engine=True, shards=stage) for stage in (1, 2, 3)},
    "fsdp2": Layout(layered=True, shards=3),
    **{f"deepspeed_zero{stage}_offload": Layout(engine=True, shards=stage, offloads=True) for stage in (2, 3)},
}
"""By strategy name; a new strategy is one line here."""


@dataclass(frozen=True)
class States:
    """Bytes on one device, whatever the batch is."""

    weights: float
    gradients: float
    optimizer: float
    working: float
    """Copies that the strategy makes while a pass runs: buckets, gathered weights."""
    stepping: float
    """What the optimizer's step needs besides, when no activations are there."""
    host: float = 0.0
    """In the host's memory, for this device."""


def numerics(layout: Layout, compute: torch.dtype) -> Numerics:
    """The dtypes of a pass: DeepSpeed's engine and FSDP2 run in the compute dtype, the others under autocast."""
    return Numerics(compute, compute if layout.engine or layout.layered else torch.float32)


def states(
    layout: Layout,
    parameters: Iterable[nn.Parameter],
    how: Numerics,
    world: int,
    cuda: bool,
    gathered: Iterable[nn.Parameter] = (),
    quantized: int = 0,
) -> States:
    """What a strategy keeps of a model.

    Args:
        parameters: each once, frozen as they will be trained.
        cuda: whether AdamW updates all parameters at once, as it does on a GPU.
        gathered: those that FSDP2 holds whole at once.
        quantized: how many of the frozen ones lie in 4 bits.
    """
    trained = frozen = largest = 0
    for parameter in parameters:
        if parameter.requires_grad:
            trained += parameter.numel()
            largest = max(largest, parameter.numel())
        else:
            frozen += parameter.numel()

    def of_each(stage: int) -> float:
        return 1 / world if layout.shards >= stage else 1.0

    part = trained * of_each(1)
    stored = MASTER if layout.layered else how.trained.itemsize
    frozen_bytes = (frozen - quantized) * how.compute.itemsize + quantized * FOUR_BITS
    weights = (frozen_bytes + trained * stored) * of_each(3)
    gradients = trained * stored * of_each(2)
    working = 0.0
    if layout.buckets:
        working += trained * how.trained.itemsize
    if layout.layered:
        for parameter in gathered:  # those trained with their gradients, and a copy to be reduced in
            each = how.compute.itemsize + parameter.requires_grad * (how.compute.itemsize + stored)
            working += parameter.numel() * each
    elif layout.shards >= 2:
        working += 2 * min(BUCKET, trained) * how.trained.itemsize
    if layout.shards == 3 and layout.engine:
        working += min(GATHERED, trained + frozen) * how.compute.itemsize
    optimizer = part * (ADAM + MASTER * layout.engine)
    stepping = part * 4 if cuda or layout.engine else 2 * largest * 4
    host = 0.0
    if layout.offloads:  # its gradients are in fp32 there
        host, optimizer, gradients, stepping = optimizer + part * MASTER, 0.0, 0.0, 0.0
        if layout.shards == 3:
            host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, working, stepping, host)
