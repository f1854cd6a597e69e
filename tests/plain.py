"""One sample through plain transformers, layer by layer with eager attention: the slow reference of stage 2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tiny import IMAGE_TOKEN
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class State:
    """A sample before a layer."""

    layer: int
    hidden: Tensor
    """[T, D]."""
    tokens: list[int]
    """Where each token was when it entered the LLM."""
    attention: Tensor
    """[T, T] this layer's, mean over heads, were nothing dropped before it."""
    previous: Tensor | None
    """[T, T] the layer before's."""
    first: Tensor
    """[T0, D] what entered the LLM."""
    keys: Tensor | None
    """[T, Hkv, d] the layer before's, rotated."""
    normed: Tensor
    """[T, D] the states after the LLM's last norm."""


Rule = Callable[[State], tuple[list[int], Tensor]]
"""What stays, as indices into the state's tokens, and the states [T, D] of all tokens, perhaps changed."""


@dataclass
class Walked:
    logits: Tensor
    """[T, V] of what left the last layer."""
    entered: dict[int, list[int]] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    position: dict[int, list[int]] = field(default_factory=dict)


def eager_copy(hf: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    eager = copy.deepcopy(hf)
    eager.set_attn_implementation("eager")
    return eager


@torch.no_grad()
def walk(
    eager: LlavaForConditionalGeneration, ids: Tensor, pixels: Tensor | None, rule: Rule, renumber: bool
) -> Walked:
    """Run one sample [L] through the LLM; the rule is asked before every layer."""
    language = eager.model.language_model
    hidden = language.embed_tokens(ids)
    if pixels is not None:
        states = eager.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden[ids == IMAGE_TOKEN] = eager.model.multi_modal_projector(states).flatten(0, 1)
    first, tokens, position, previous = hidden, list(range(len(ids))), torch.arange(len(ids)), None
    keys = None
    walked = Walked(hidden)
    for index, layer in enumerate(language.layers):
        _, attention = attend(language, layer, hidden, position)
        keep, hidden = rule(State(index, hidden, tokens, attention, previous, first, keys, language.norm(hidden)))
        hidden, tokens, position = hidden[keep], [tokens[i] for i in keep], position[keep]
        if renumber:
            position = torch.arange(len(keep))
        walked.entered[index], walked.hidden[index], walked.position[index] = tokens, hidden, position.tolist()
        keys = keys_of(language, layer, hidden, position)
        mixed, previous = attend(language, layer, hidden, position)
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    walked.logits = eager.lm_head(language.norm(hidden))
    return walked


def attend(
    language: torch.nn.Module, layer: torch.nn.Module, hidden: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """What a layer's attention adds [T, D], and its weights [T, T], mean over heads."""
    future = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)[None, None]
    tables = language.rotary_emb(hidden[None], position[None])
    out, weights = layer.self_attn(
        layer.input_layernorm(hidden)[None], position_embeddings=tables, attention_mask=future
    )
    return out[0], weights[0].mean(0)


def keys_of(language: torch.nn.Module, layer: torch.nn.Module, hidden: Tensor, position: Tensor) -> Tensor:
    """[T, Hkv, d] a layer's keys, rotated."""
    attention = layer.self_attn
    keys = attention.k_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))[None].transpose(1, 2)
    cos, sin = language.rotary_emb(hidden[None], position[None])
    return apply_rotary_pos_emb(keys, keys, cos, sin)[1][0].transpose(0, 1)


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the largest, in order of place."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
