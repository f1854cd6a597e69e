"""What the walk needs to know of a decoder layer: recomputed, rotated queries and keys for scoring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmprune_train.errors import UserError
from mmprune_train.model.rows import by_rows
from mmprune_train.packed.host import upload
from mmprune_train.pruning import Pruner

SUPPORTED = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Decoder families held to plain transformers in the tests: pre-norm layers with q_proj and k_proj (Phi-3: qkv_proj),
causal attention and RoPE, of the whole head or of a part. What is their own otherwise (Gemma's scaled embeddings and
1 + weight norms) is inside the modules that the walk calls."""


def check_language_model(config: object) -> None:
    """Raise UserError for a decoder this walk does not reproduce."""
    model_type = getattr(config, "model_type", "?")
    if model_type not in SUPPORTED:
        raise UserError(f"llm of type {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    if _slides(config):
        raise UserError(
            f"llm of type {model_type!r} has sliding-window layers, which the packed walk does not apply; "
            "set use_sliding_window=false (or sliding_window=null) in llm.arch, or in config.json of llm.path; "
            "for sequences no longer than the window that is the same network"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            f"llm of type {model_type!r} attends in both directions, the packed walk is causal; choose a causal LLM "
            "(use_bidirectional_attention=false)"
        )


def _slides(config: Any) -> bool:
    """Whether a window cuts attention short of the longest sequence. Families without `layer_types` (Mistral, Phi-3)
    apply `sliding_window` in every layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None)
    return window is not None and window < config.max_position_embeddings


def checkpoint_layers(model: Any, which: str) -> None:
    """Let LLM layers of a PackedLlava keep nothing for the backward pass but what enters them: `all` layers, or those
    `before` or `after` the first pruning layer. Choosing tokens happens between layers, and is not done again."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    layers = model.hf.model.language_model.layers
    for layer, again in zip(layers, computed_again(model.pruner, len(layers), which), strict=True):
        layer.gradient_checkpointing = again


def computed_again(pruner: Pruner, depth: int, which: str | None) -> list[bool]:
    """Of each of `depth` LLM layers whether the backward pass runs it again, as in `checkpoint_layers`; None: no."""
    first = min(pruner.layers(depth), default=depth)
    return [which == "all" or which == ("before" if index < first else "after") for index in range(depth)]


def compile_layers(model: Any) -> None:
    """Compile each LLM layer of a PackedLlava with torch.compile; attention stays outside of the graphs, and lengths
    are symbols, so that one compilation serves all layers and batches."""
    for layer in model.hf.model.language_model.layers:
        layer.compile(dynamic=True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Context in which parts of a module may be called from outside of it, also where FSDP2 has sharded its weights;
    ZeRO-3 gathers for each part."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


class ScoringKeys:
    """Queries of chosen rows and keys of all tokens, as `layer` will compute them, without an attention matrix.

    Args:
        layer: the decoder layer that is about to run.
        hidden: [T, D] states entering it.
        cos: [T, d] rotary table of the tokens' positions; narrower where the family turns part of a head.
        sin: as `cos`.
    """

    def __init__(self, layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        self.layer = layer
        self.hidden = hidden
        self.cos, self.sin = cos, sin
        self.ran = False
        """Whether the layer's norm and projections were run."""

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [R], on the host -> queries [R, H, d], scaled by 1/sqrt(d), and keys [T, Hkv, d]."""
        self.ran = True
        rows = upload(rows, self.hidden.device)
        attention = self.layer.self_attn
        with looking(self.hidden.device):
            query, keys = _projections(attention, self.layer.input_layernorm(self.hidden), rows)
            if hasattr(attention, "q_norm"):  # Qwen3 normalises each head
                query, keys = attention.q_norm(query), attention.k_norm(keys)
        family = attention.config.model_type
        rotate = import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
        query = rotate(query, query, self.cos[rows], self.sin[rows])[0]
        keys = rotate(keys, keys, self.cos, self.sin)[0]
        return query * attention.scaling, keys


def looking(device: torch.device) -> torch.autocast:
    """Autocast as it is, but without its cache of cast weights: a weight that was cast where no gradient is taken would
    be found without one by the pass that trains it (torch before 2.10)."""
    kind = device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def _projections(attention: Any, normed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [R, H, d] of some rows and keys [T, Hkv, d] of all, from normalised states [T, D].

    A fused projection (Phi-3) is run whole, so that its adapters count and sharded weights are gathered.
    """
    if hasattr(attention, "qkv_proj"):
        with without_dropout(attention.qkv_proj):
            fused = by_rows(attention.qkv_proj, normed).unflatten(-1, (-1, attention.head_dim))  # [T, H + 2 Hkv, d]
        groups = attention.num_key_value_heads
        query, keys, _ = fused.split((fused.shape[1] - 2 * groups, groups, groups), dim=1)
        return query[rows], keys
    with without_dropout(attention.q_proj, attention.k_proj):
        query, keys = by_rows(attention.q_proj, normed[rows]), by_rows(attention.k_proj, normed)
    return query.unflatten(-1, (-1, attention.head_dim)), keys.unflatten(-1, (-1, attention.head_dim))


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
