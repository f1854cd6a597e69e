"""Counters of a block of code: FLOPs, and peak memory, of a GPU by its allocator, of a CPU by following storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """Context that counts; `get_total_flops()` afterwards.

    torch's own counter knows the attention kernels of GPUs alone and takes the CPU's for nothing. As it does, causal
    attention is counted whole. Products that are added in place it leaves out, too.
    """
    aten: Any = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
        aten.addmm_: _product,
        aten.baddbmm_: _product,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _product(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    return 2 * prod(left) * right[-1]


@dataclass
class Peak:
    """Highest rise of memory, known once the context is left."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Peak]:
    """Context that measures how far memory rises above what was there when it was entered.

    On a CPU every operation passes through Python, so do not time what is measured; memory inside a kernel is not seen
    there, nor what compiled graphs allocate themselves.
    """
    device, peak = torch.device(device), Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveStorages(device.type) as storages:
            yield peak
        peak.bytes = storages.peak


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed; also of fake tensors, which have none. An
    operation that returns a view, or writes in place, returns the storage of one of its inputs: nothing new.

    Args:
        kind: type of the device whose tensors count.
    """

    live: int = 0
    """Bytes there are now, of those made inside."""
    peak: int = 0
    """Most there have been; may be set back to `live`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {storage._cdata for storage in self._of((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in self._of(result):
            if storage._cdata not in known and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata).atexit = False
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result

    def _of(self, values: Any) -> list[torch.UntypedStorage]:
        tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
        return [t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type == self.kind]

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
