"""What a part of the network keeps and needs, found by running it on tensors without memory.

A decoder layer of whatever family, adapters and dtype runs forward and backward under torch's fake tensors, at the
length in question, while the storages it makes are followed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmprune_train.benchmark.counters import LiveStorages


@dataclass(frozen=True)
class Numerics:
    """The dtypes a network runs in."""

    compute: torch.dtype
    """Of frozen weights and of matrix products."""
    trained: torch.dtype
    """Of trained weights; another than `compute` means autocast."""

    @property
    def autocast(self) -> bool:
        return self.trained != self.compute


@dataclass(frozen=True)
class Footprint:
    """Bytes of one part at some number of rows."""

    saved: float = 0.0
    """Kept from the forward pass for the backward one, what the part puts out left aside."""
    forward: float = 0.0
    """Highest rise in the forward pass, with the part's input and `saved`."""
    plain: float = 0.0
    """The same where nothing is kept."""
    backward: float = 0.0
    """Highest rise in the backward pass above `saved` and the output's gradient, gradients of weights included."""


@dataclass
class Probe:
    """One part, run at any number of rows."""

    module: nn.Module
    """On the meta device, frozen as it will be trained; a copy is run."""
    call: Callable[[Any, Tensor], Tensor]
    """(module, states [rows, width]) -> states, or a loss."""
    width: int
    dtype: torch.dtype
    """Of the states."""
    flows: bool
    """Whether the states have a gradient."""
    how: Numerics

    def __post_init__(self) -> None:
        self._part = copy.deepcopy(self.module)
        self._mode = FakeTensorMode()
        self._seen: dict[int, Footprint] = {}
        with self._mode:
            _fill(self._part, self.how)

    def __call__(self, rows: float) -> Footprint:
        """The footprint at that many rows, rounded up."""
        whole = int(-(-rows // 1))
        if whole not in self._seen:
            with self._mode:
                self._seen[whole] = self._run(whole) if whole else Footprint()
        return self._seen[whole]

    def _run(self, rows: int) -> Footprint:
        with torch.no_grad():
            plain = self._forward(rows)[0].peak
        memory, out = self._forward(rows)
        forward = memory.peak
        kept = memory.live - out.untyped_storage().nbytes()
        if not out.requires_grad:
            return Footprint(0.0, plain, plain, 0.0)
        with memory:
            memory.peak = memory.live
            grad = torch.empty_like(out)
            before = memory.live
            torch.autograd.backward([out], [grad])
        self._part.zero_grad(set_to_none=True)
        return Footprint(kept, forward, plain, memory.peak - before)

    def _forward(self, rows: int) -> tuple[LiveStorages, Tensor]:
        """The storages that are followed, and the output."""
        with LiveStorages("cpu") as memory, torch.autocast("cpu", torch.bfloat16, enabled=self.how.autocast):
            seed = torch.zeros((), dtype=self.dtype, requires_grad=self.flows)
            out = self.call(self._part, seed.expand(rows, self.width).clone())
        return memory, out


def _fill(part: nn.Module, how: Numerics) -> None:
    """Give a meta module fake tensors on a CPU for its parameters and buffers, in place; inside a FakeTensorMode."""
    for owner in part.modules():
        for name, old in list(owner.named_parameters(recurse=False)):
            dtype = how.trained if old.requires_grad else how.compute
            owner.register_parameter(name, nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
