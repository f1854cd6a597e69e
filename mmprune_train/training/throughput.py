"""What the hardware could do at most, against which a run's model FLOPs are set (MFU, Chowdhery et al. 2022)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mmprune_train.devices import present_device

SIDE = 1536
"""Of the matrices whose product is measured."""
STARVED = 0.2
"""Share of the time spent waiting for data from which a run is told so."""


@dataclass(frozen=True)
class Peak:
    tflops: float
    source: str
    """Where the figure comes from, for the line that is printed."""


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The device's dense matrix throughput in `dtype`: the data sheet's where it is known, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = present_device()
        if known is not None and known.tflops is not None:
            return Peak(known.tflops, f"{known.name}'s data sheet")
    return Peak(measured_tflops(device, dtype), "a matrix product measured now")


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """1e12 FLOPs a second: best of some products of two square matrices."""
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(21):
        _wait(device)
        began = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
