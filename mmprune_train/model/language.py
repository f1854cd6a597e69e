"""What the walk needs to know of a decoder layer: recomputed, rotated queries and keys for scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mmprune_train.errors import UserError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""Decoder families held to plain transformers in the tests: pre-norm layers with q_proj, k_proj and RoPE."""


def check_language_model(config: object) -> None:
    """Raise UserError for a decoder this walk does not reproduce."""
    model_type = getattr(config, "model_type", "?")
    if model_type not in SUPPORTED:
        raise UserError(f"llm of type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError(
            f"llm of type {model_type!r} has sliding-window layers, which the packed walk does not apply; "
            "set use_sliding_window=false (or sliding_window=null) in llm.arch"
        )


def scoring_queries_keys(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Queries of chosen rows and keys of all tokens, as `layer` will compute them, without an attention matrix.

    Args:
        layer: the decoder layer that is about to run.
        hidden: [T, D] states entering it.
        cos, sin: [T, d] rotary tables of the tokens' positions.
    Returns:
        rows [R] -> queries [R, H, d], scaled by 1/sqrt(d), and keys [T, Hkv, d].
    """

    def query_keys(rows: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        with without_dropout(attention.q_proj, attention.k_proj):
            query = attention.q_proj(normed[rows]).unflatten(-1, (-1, attention.head_dim))
            keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):  # Qwen3 normalises each head
            query, keys = attention.q_norm(query), attention.k_norm(keys)
        query = apply_rotary_pos_emb(query, query, cos[rows], sin[rows])[0]
        keys = apply_rotary_pos_emb(keys, keys, cos, sin)[0]
        return query * attention.scaling, keys

    return query_keys


@contextmanager
def without_dropout(*modules: nn.Module) -> Iterator[None]:
    """Adapters drop at random while they train; what a token is worth should not depend on it."""
    active = [part for module in modules for part in module.modules() if isinstance(part, nn.Dropout) and part.training]
    for part in active:
        part.training = False
    try:
        yield
    finally:
        for part in active:
            part.training = True


def rotary(language_model: Any, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables for position ids [B, L]: cos and sin [B, L, d]."""
    with torch.no_grad():
        cos, sin = language_model.rotary_emb(hidden, position)
    return cos, sin
