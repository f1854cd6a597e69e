"""Weights that no process holds all of: how they come from the first process, and how they get back to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmprune_train.model.llava import PackedLlava


@runtime_checkable
class Sharding(Protocol):
    """A strategy that splits the weights themselves. Every process must make each call."""

    is_global_zero: bool

    def shard(self, model: PackedLlava) -> None:
        """Leave each process its part of the first one's weights; the others' `model` may be on the meta device."""
        ...

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A sharded parameter with all its values, on its device."""
        ...


def shards_weights(strategy: Any) -> bool:
    """Whether a strategy splits the weights (FSDP2, ZeRO-3): then only the first process needs to load them."""
    return isinstance(strategy, Sharding) and getattr(strategy, "zero_stage_3", True)


def replace_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> list[tuple[dict[str, Any], str, Any]]:
    """Put `change(tensor)` in the place of every parameter and buffer inside a module; one that several modules share
    is changed once and stays shared.

    Returns:
        Where each was and what it was, for `undo`.
    """
    new: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Any]] = []
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in new:
                    changed = change(tensor)
                    if isinstance(tensor, nn.Parameter) and not isinstance(changed, nn.Parameter):
                        changed = nn.Parameter(changed, requires_grad=tensor.requires_grad)
                    new[id(tensor)] = changed
                before.append((held, name, tensor))
    for place, name, tensor in before:
        place[name] = new[id(tensor)]
    return before


def undo(before: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Take back what `replace_tensors` did."""
    for held, name, tensor in before:
        held[name] = tensor


def from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """The first process's values of a tensor, on `device`; the others' may be on the meta device."""
    own = tensor.detach()
    there = torch.empty_like(own, device=device) if own.is_meta else own.to(device).contiguous()
    torch.distributed.broadcast(there, 0)
    return there


def broadcast(module: nn.Module, device: torch.device, stay: bool = False) -> None:
    """Give every process the first one's values of a module's parameters and buffers, one after the other. What is
    sharded already is left alone.

    Args:
        device: where they are sent, and where they are then.
        stay: they are on the CPU then.
    """

    def from_rank_0(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor
        values = from_first(tensor, device)
        return values.cpu() if stay else values

    replace_tensors(module, from_rank_0)


@contextmanager
def whole_weights(strategy: Any, model: nn.Module) -> Iterator[None]:
    """Context in which the first process's `model` holds every parameter whole, on the CPU where the strategy shards
    them. Every process must enter it; the others keep their parts and never hold more than one parameter besides."""
    if not shards_weights(strategy):
        yield
        return
    first = strategy.is_global_zero

    def gathered(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor
        values = strategy.whole(tensor)
        return values.detach().cpu() if first else tensor

    before = replace_tensors(model, gathered)
    try:
        yield
    finally:
        undo(before)
