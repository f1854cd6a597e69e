"""LoRA's sum with fewer passes over memory than PEFT's own.

For y = W x + s B A x, PEFT writes B A x, s B A x and the sum, each as large as y. The adapters' products are tiny, so
those passes are about half of what LoRA adds to a step on a CPU. Here s scales A x, which has r features only, and the
product with B is added to W x where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn


class AddedInPlace(LoraVariant):
    """Plain LoRA (Hu et al. 2021) in PEFT's own Linear: same weights, same files, same sum."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Nothing beside plain LoRA's own weights."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """x [..., in]; what the frozen Linear made of it, `result` [..., out], which may be changed -> [..., out]."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if not torch.is_autocast_enabled(x.device.type):  # which would cast back what is cast here
            x = x.to(down.weight.dtype)
        sharded = hasattr(down.weight, "ds_id")  # by ZeRO-3, which gathers B when it is called
        narrow = down(module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter]  # [..., r]
        if sharded or narrow.dtype != result.dtype or narrow.dim() not in (2, 3):
            return result + up(narrow)
        wide = up.weight.to(narrow.dtype).t()
        if narrow.dim() == 2:
            return result.addmm_(narrow, wide)
        wide = wide.expand(len(narrow), -1, -1)
        if module.get_base_layer().bias is not None:  # then W x is a view: autograd copies gradients of changed views
            return torch.baddbmm(result, narrow, wide)
        return result.baddbmm_(narrow, wide)


def add_in_place(module: nn.Module) -> None:
    """Let the plain LoRA adapters inside add in place; DoRA and 4-bit layers stay PEFT's."""
    for part in _adapted_linears(module):
        if not part.lora_variant and not any(part.lora_bias.values()):
            part.cast_input_dtype_enabled = False
            part.lora_variant.update(dict.fromkeys(part.lora_A, AddedInPlace()))


@contextmanager
def as_peft_adds(module: nn.Module) -> Iterator[None]:
    """While the context lasts, the adapters inside are computed as PEFT computes them."""
    changed = [part for part in _adapted_linears(module) if adds_in_place(part)]
    for part in changed:
        part.lora_variant.clear()
        part.cast_input_dtype_enabled = True
    try:
        yield
    finally:
        for part in changed:
            add_in_place(part)


def adds_in_place(layer: Any) -> bool:
    """Whether all adapters of one of PEFT's Linears do."""
    variants = layer.lora_variant
    return bool(variants) and all(isinstance(variant, AddedInPlace) for variant in variants.values())


def _adapted_linears(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if type(part) is Linear]
