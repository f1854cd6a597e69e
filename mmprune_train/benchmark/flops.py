"""PyTorch's own count of floating-point operations, also where attention runs in the CPU's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """A context whose `get_total_flops()` is what ran inside it, multiply and add counted apart.

    As everywhere in PyTorch's counter, attention counts for its whole L x L square, also where it is causal. Kernels
    from outside of PyTorch (FlashAttention) are not seen.
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        },
    )


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
