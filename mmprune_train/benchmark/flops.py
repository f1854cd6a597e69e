"""FLOPs of a block of code as torch counts them, attention on a CPU included."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
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
