"""Attention over a packed sequence: every token sees the earlier tokens of its own sample, and no padding exists.

Registered with transformers' `AttentionInterface`, so Hugging Face's decoder layers run unchanged. The kernel is chosen
at run time: FlashAttention's varlen kernel on CUDA where it is installed and the dtype fits, else SDPA per sample.
Without packing borders (decoding with a cache) it is plain SDPA under the given mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "mmprune_packed"


@dataclass
class Borders:
    """Borders of the samples of a packed sequence, on the device and on the host."""

    cu_seqlens: Tensor
    """[B + 1] int32."""
    lengths: list[int]

    @property
    def longest(self) -> int:
        return max(self.lengths)


@cache
def flash_available() -> bool:
    """Whether FlashAttention's varlen kernel can be imported."""
    return find_spec("flash_attn") is not None


def backend(query: Tensor) -> str:
    """`flash_varlen` or `sdpa_per_sample`, whichever this tensor's device, dtype and installation allow."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return "flash_varlen" if query.is_cuda and half and flash_available() else "sdpa_per_sample"


def _flash_varlen(
    query: Tensor, key: Tensor, value: Tensor, borders: Borders, scaling: float, dropout: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    cu, longest = borders.cu_seqlens, borders.longest
    out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, dropout, softmax_scale=scaling, causal=True)
    return out[None]  # [1, T, H, d]


def _sdpa_per_sample(
    query: Tensor, key: Tensor, value: Tensor, borders: Borders, scaling: float, dropout: float
) -> Tensor:
    parts = zip(*(x.split(borders.lengths, dim=2) for x in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outs = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(outs, dim=2).transpose(1, 2)  # [1, T, H, d]


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
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary tables in fp32 lift q and k out of the autocast dtype
        half = torch.get_autocast_dtype(device)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if borders is not None:
        kernel = _flash_varlen if backend(query) == "flash_varlen" else _sdpa_per_sample
        return kernel(query, key, value, borders, scaling, dropout), None
    out = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
