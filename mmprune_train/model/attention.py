"""Attention over a packed sequence: every token sees the earlier tokens of its own sample, and no padding exists.

Registered with transformers' `AttentionInterface`, so Hugging Face's decoder layers run unchanged. `kernels` has what
attends inside the borders; without borders (decoding with a cache) it is plain SDPA under the given mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mmprune_train.model.kernels import Backend, Borders, choose_backend
from mmprune_train.model.rows import computed_in

NAME = "mmprune_packed"


def backend_for(setting: str, language_config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """`choose_backend` for the heads of an LLM whose states are in `dtype` where no autocast is on."""
    width = language_config.hidden_size // language_config.num_attention_heads
    head_dim = getattr(language_config, "head_dim", None) or width
    dropout = getattr(language_config, "attention_dropout", 0.0) or 0.0
    return choose_backend(setting, device, computed_in(device, dtype), head_dim, dropout)


@torch.compiler.disable  # kernels of any kind, and samples of any length, stay out of compiled graphs
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    borders: Borders | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, L, d], key and value [B, Hkv, S, d] -> [B, L, H, d].

    With `borders` (B = 1) attention is causal inside each sample; without, `attention_mask` (bool, true = visible)
    decides.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = computed_in(query.device, query.dtype)  # rotary tables in fp32 lift q and k out of the autocast dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if borders is not None:
        return borders.backend.run(query, key, value, borders, scaling, dropout), None
    out = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
