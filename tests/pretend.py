"""A device that is none: tensors that say they are on CUDA and compute on the CPU, and a count of who waits for them.

Tensors on it cannot be mixed with those of the host, as on a real device, so a field that was left behind shows. What
makes the host wait on CUDA is written down: reading a number, operators whose result's shape depends on the data,
copies to the host, and copies from memory of the host that is not pinned or not `non_blocking` (of these
`torch.tensor(..., device=)` fails outright).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

import mmprune_train
from mmprune_train.packed import host

aten = torch.ops.aten
DEVICE = torch.device("xla", 0)
WAITS = {
    aten._local_scalar_dense.default,
    aten._linalg_eigh.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operators that wait; `repeat_interleave` does not where it is told its output's size."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class DeviceTensor(Tensor):
    """Wraps what is stored."""

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=stored.dtype,
            device="meta",  # whose backward pass needs no thread of its own
        )
        made.stored = stored
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's own reads the memory of a subclass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the pretended device")


class PretendedDevice(TorchDispatchMode):
    """While it is active, `device="cuda"` is the pretended one."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches: list[str] = []
        """Lines that called `fetch`."""
        self.waits: list[str] = []
        """Lines that waited otherwise, each with the operator."""
        self._pinned: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        if func is aten.is_pinned.default:
            return args[0] in self._pinned
        if func is aten._pin_memory.default:
            self._pinned[made := args[0].clone()] = True
            return made
        goes = kwargs.get("device")
        if not here and (goes is None or torch.device(goes).type == "cpu"):
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._copy(func, args[0], kwargs)
        if func is aten.copy_.default and (isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor)):
            self._cross(args[1], len(args) > 2 and args[2], func)
            _stored(args[0]).copy_(_stored(args[1]))
            return args[0]
        self._check(func, args, kwargs, tensors, here)
        if goes is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map_only(DeviceTensor, _stored, args), **tree_map_only(DeviceTensor, _stored, kwargs))
        owner = {id(tensor.stored): tensor for tensor in here}
        return tree_map_only(Tensor, lambda made: owner[id(made)] if id(made) in owner else DeviceTensor(made), out)

    def _check(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], here: list[Tensor]) -> None:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
        if func in INDEXING:
            index = [part for part in args[1] if part is not None]
            filled = func is not aten.index.Tensor and args[2].numel() == 1  # by a mask: no places are needed
            if any(part.dtype in (torch.bool, torch.uint8) for part in index) and not filled:
                self._write(func)
            elif strangers:
                self._write(func)  # the index is copied from memory that is not pinned
        elif here and strangers:
            raise AssertionError(f"{func} meets host and device at {_line()}")
        elif func in WAITS and "output_size" not in kwargs:
            self._write(func)

    def _copy(self, func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        goes, waits = kwargs.pop("device", None), not kwargs.pop("non_blocking", False)
        made = func(_stored(source), **kwargs)
        was = isinstance(source, DeviceTensor)
        stays_or_comes = was if goes is None else torch.device(goes).type != "cpu"
        if was != stays_or_comes:
            self._cross(source, not waits, func)
        return DeviceTensor(made) if stays_or_comes else made

    def _cross(self, source: Tensor, non_blocking: bool, func: Any) -> None:
        if isinstance(source, DeviceTensor):
            if _inside(host.fetch):
                self.fetches.append(_line())
            else:
                self._write(func)
        elif source.dim() and not (non_blocking and source in self._pinned):
            self._write(func)

    def _write(self, func: Any) -> None:
        self.waits.append(f"{func} at {_line()}")


def _stored(tensor: Tensor) -> Tensor:
    return tensor.stored if isinstance(tensor, DeviceTensor) else tensor


def _frames() -> list[Any]:
    frame, found = sys._getframe(1), []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _inside(function: Callable[..., Any]) -> bool:
    return any(frame.f_code is function.__code__ for frame in _frames())


def _line() -> str:
    """The lines of ours that led here, and the one below that asked."""
    root = str(Path(mmprune_train.__file__).parent)
    ours = [frame for frame in _frames() if frame.f_code.co_filename.startswith(root)]
    other = [
        frame
        for frame in _frames()
        if "/torch/" not in frame.f_code.co_filename and frame.f_code.co_filename != __file__
    ]
    lines = dict.fromkeys(
        f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" for frame in [*other[:1], *ours[:3]]
    )
    return " < ".join(lines)


def on_device(tensor: Tensor) -> DeviceTensor:
    """A copy of the tensor, on the pretended device."""
    return DeviceTensor(tensor.detach().clone())


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the pretended device, in place."""
    moved: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    with PretendedDevice():
                        moved[parameter] = nn.Parameter(on_device(parameter), parameter.requires_grad)
                part._parameters[name] = moved[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_device(buffer)
    return module
