"""Peak memory of a block of code, on a GPU as its allocator counts it, on a CPU by following storages."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory:
    """Context that measures how far memory rises above what was there when it was entered.

    `with PeakMemory(device) as peak: ...`, then `peak.bytes`. On a CPU every operation passes through Python, so do not
    time what is measured; memory inside a kernel is not seen there, nor what compiled graphs allocate themselves.

    Args:
        device: whose memory.
    """

    bytes: int = 0
    """Highest rise so far, bytes; final once the context is left."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._storages: LiveStorages | None = None
        self._before = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._storages = LiveStorages(self.device.type)
            self._storages.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._storages is None:
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._storages.__exit__(*error)
            self.bytes = self._storages.peak


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
                self._add(storage)
        return result

    def _of(self, values: Any) -> list[torch.UntypedStorage]:
        tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
        return [t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type == self.kind]

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata).atexit = False
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
