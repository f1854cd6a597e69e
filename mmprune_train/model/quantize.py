"""The frozen LLM in 4 bits: QLoRA's NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mmprune_train.errors import UserError

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: four bits, a scale of 8 bits for 64 of them, and one of 32 bits for 256 scales."""


def check_quantization(accelerator: str) -> None:
    """Raise UserError where 4-bit weights cannot be trained on: off CUDA, or without bitsandbytes."""
    missing = []
    if accelerator != "cuda":
        missing.append("a CUDA device (trainer.accelerator)")
    if find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes (pip install 'mmprune-train[gpu]')")
    if missing:
        raise UserError(f"peft=qlora: this run is without {' and without '.join(missing)}; peft=lora needs neither")


def quantize_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every Linear inside a weight that bitsandbytes quantises when it next moves to a device, in place, and
    multiplies by in `dtype`."""
    import bitsandbytes as bnb

    how = {"compress_statistics": True, "quant_type": "nf4"}
    for name, part in list(module.named_modules()):
        if type(part) is nn.Linear:
            packed = bnb.nn.Linear4bit(
                part.in_features, part.out_features, part.bias is not None, compute_dtype=dtype, device="meta", **how
            )
            packed.weight = bnb.nn.Params4bit(part.weight.data, requires_grad=False, module=packed, **how)
            packed.bias = part.bias
            module.set_submodule(name, packed)


def is_quantized(linear: nn.Module) -> bool:
    """Whether a Linear's weight lies in 4 bits."""
    return getattr(linear.weight, "quant_state", None) is not None


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [out, in] that a Linear multiplies by, out of its 4 bits where it is quantised."""
    weight: Any = linear.weight
    if not is_quantized(linear):
        return weight.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)
