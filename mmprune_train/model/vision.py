"""The vision tower, walked layer by layer: it stops at the feature layer and recomputes one row for scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlavaConfig

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.errors import UserError
from mmprune_train.pruning.views import VisionView


@dataclass(frozen=True)
class Family:
    """How one of transformers' vision towers is laid out."""

    layers: Callable[[Any], Sequence[nn.Module]]
    norm: str
    """Attribute of a layer: the norm before attention."""
    attention: str
    """Attribute of a layer: the module with q_proj and k_proj."""
    has_cls: bool = True
    embed: Callable[[Any, Tensor], Tensor] = lambda tower, pixels: tower.embeddings(pixels)
    """tower, pixels [I, 3, H, W] -> states [I, (1 +) N, D]."""


def _clip_states(tower: Any, pixels: Tensor) -> Tensor:
    return tower.pre_layrnorm(tower.embeddings(pixels))


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(lambda tower: tower.encoder.layers, "layer_norm1", "self_attn", embed=_clip_states),
    "dinov2": Family(lambda tower: tower.encoder.layer, "norm1", "attention"),
    "siglip_vision_model": Family(lambda tower: tower.encoder.layers, "layer_norm1", "self_attn", has_cls=False),
    "vit": Family(lambda tower: tower.layers, "layernorm_before", "attention"),
}
"""Laid out by `model_type`; SigLIP 2's fixed-resolution checkpoints are `siglip_vision_model`s, too."""

NAFLEX = (
    "; it reads patches of any aspect ratio (NaFlex), which LLaVA does not feed: take a fixed-resolution SigLIP 2 "
    "checkpoint, which is of type siglip_vision_model"
)


def family_of(model_type: str) -> Family:
    """The layout of a vision tower; UserError names the supported ones."""
    if model_type not in FAMILIES:
        why = NAFLEX if model_type == "siglip2_vision_model" else ""
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"encoder of type {model_type!r} is not supported; supported: {known}{why}")
    return FAMILIES[model_type]


@torch.no_grad()
def embedded(tower: Any, height: int, width: int) -> int:
    """How many states, CLS among them, a tower makes of an image: measured on blank pixels, on any device.

    Raises:
        ValueError, RuntimeError: it reads images of another size.
    """
    pixels = torch.zeros((1, 3, height, width), dtype=tower.dtype, device=tower.device)
    return int(family_of(tower.config.model_type).embed(tower, pixels).shape[1])


def features_of(config: LlavaConfig, height: int, width: int) -> int:
    """Features that the LLM gets of an image of this size, by the config alone."""
    vision = config.vision_config
    states = (height // vision.patch_size) * (width // vision.patch_size) + family_of(vision.model_type).has_cls
    return states - (config.vision_feature_select_strategy == "default")


def check_patches(tower: Any, encoder: EncoderConfig) -> None:
    """Raise UserError where a tower gives other patches than its keys say."""
    kind, has_cls = tower.config.model_type, family_of(tower.config.model_type).has_cls
    if encoder.has_cls != has_cls:
        raise UserError(
            f"encoder.has_cls={str(encoder.has_cls).lower()}: a {kind} has {'a' if has_cls else 'no'} CLS token; set "
            f"encoder.has_cls={str(has_cls).lower()}"
        )
    keys = f"encoder.image_size={encoder.image_size}, encoder.patch_size={encoder.patch_size}"
    own = f"image_size={tower.config.image_size}, patch_size={tower.config.patch_size}"
    try:
        patches = embedded(tower, encoder.image_size, encoder.image_size) - has_cls
    except (ValueError, RuntimeError):
        raise UserError(f"{keys}: encoder {encoder.name}, a {kind}, has {own}; set the keys to these") from None
    if patches != encoder.patches:
        raise UserError(
            f"{keys} are {encoder.patches} patches an image, but encoder {encoder.name}, a {kind} with {own}, makes "
            f"{patches}; set the keys to these"
        )


def feature_indices(feature_layer: int | list[int], blocks: int) -> list[int]:
    """The hidden states, 0 = embeddings, that are the features of an encoder with this many blocks."""
    wanted = feature_layer if isinstance(feature_layer, list) else [feature_layer]
    if any(not -blocks - 1 <= index <= blocks for index in wanted):
        raise UserError(
            f"vision_feature_layer={feature_layer}: the encoder has hidden states {-blocks - 1}..{blocks}; correct "
            "config.json"
        )
    return [index if index >= 0 else blocks + 1 + index for index in wanted]


def deepest_feature(feature_layer: int | list[int], blocks: int) -> int:
    """The last of these."""
    return max(feature_indices(feature_layer, blocks))


def scored_block(layer: int | float | None, deepest: int, blocks: int) -> int:
    """Index of the block whose queries and keys stage 1 reads: given as such, negative from the end or, not whole, as a
    share of the depth; None: the one that made hidden state `deepest`."""
    if layer is None:
        return max(deepest - 1, 0)
    if isinstance(layer, float):
        return int(layer * blocks + 1e-9)
    if not -blocks <= layer < blocks:
        raise UserError(f"pruner.vision.layer={layer}: this encoder has blocks {-blocks}..{blocks - 1}")
    return int(layer) % blocks


def states_read(feature_layer: int | list[int], layers: Iterable[int | float | None], blocks: int) -> set[int]:
    """Hidden states, 0 = embeddings, that the features and the views of `encode` are made of."""
    deepest = deepest_feature(feature_layer, blocks)
    read = {*feature_indices(feature_layer, blocks), deepest}
    for layer in layers:
        block = scored_block(layer, deepest, blocks)
        read |= {min(block, deepest), deepest if layer is None else min(block + 1, deepest)}
    return read


def encode(
    tower: Any,
    pixels: Tensor,
    feature_layer: int | list[int],
    drop_cls: bool,
    layers: Sequence[int | float | None] = (None,),
) -> tuple[Tensor, VisionView]:
    """Run the tower up to the feature layer.

    Args:
        tower: a transformers vision model of a supported family.
        pixels: [I, 3, H, W].
        feature_layer: index (or several, concatenated) into the hidden states, 0 = embeddings, negative from the end.
        drop_cls: features are the patches alone (LLaVA's "default" selection).
        layers: blocks whose queries, keys and output can be looked at; None: the one that made the last feature layer.
            The view shows the first of them, its `block` the others.
    Returns:
        features [I, N, D * number of feature layers] for the projector, and the view stage 1 scores.
    """
    family = family_of(tower.config.model_type)
    blocks = family.layers(tower)
    indices = feature_indices(feature_layer, len(blocks))
    deepest = deepest_feature(feature_layer, len(blocks))
    states = family.embed(tower, pixels)
    wanted = states_read(feature_layer, layers, len(blocks))
    kept = {0: states}
    for index in range(deepest):
        states = blocks[index](states, None)
        kept = {number: held for number, held in kept.items() if number in wanted} | {index + 1: states}
    first = 1 if family.has_cls else 0
    features = torch.cat([kept[index] for index in indices], dim=-1)
    cls_feature = features[:, 0] if family.has_cls else None
    features = features[:, 1:] if drop_cls else features

    patches = states.shape[1] - first
    rows = round((patches * pixels.shape[-2] / pixels.shape[-1]) ** 0.5)

    @torch.no_grad()
    def probe_query_keys() -> tuple[Tensor, Tensor]:
        return _pooling_projections(tower, _run(blocks[deepest:], states, tower.head))

    def shown(layer: int | float | None) -> VisionView:
        block = scored_block(layer, deepest, len(blocks))
        nearest = min(block, deepest)
        attention: Any = getattr(blocks[block], family.attention)

        @cache
        @torch.no_grad()
        def normed() -> Tensor:
            """[I, (1 +) N, D] what the chosen block's projections read."""
            entering = _run(blocks[nearest:block], kept[nearest].detach(), blocks[block])
            return getattr(blocks[block], family.norm)(entering)

        @cache
        @torch.no_grad()
        def block_output() -> Tensor:
            """[I, N, D] the patches as the chosen block puts them out."""
            made = deepest if layer is None else block + 1
            out = kept[made] if made <= deepest else _run(blocks[deepest:made], states.detach(), blocks[block])
            return out[:, first:].detach()

        @cache
        @torch.no_grad()
        def keys() -> Tensor:
            return attention.k_proj(normed())

        @torch.no_grad()
        def cls_query_keys() -> tuple[Tensor, Tensor]:
            return attention.q_proj(normed()[:, 0]), keys()

        return VisionView(
            patches=states[:, first:].detach(),
            grid=(rows, patches // rows),
            patch_keys=lambda: keys()[:, first:],
            cls=states[:, 0].detach() if family.has_cls else None,
            cls_feature=cls_feature,
            cls_query_keys=cls_query_keys if family.has_cls else None,
            probe_query_keys=probe_query_keys if getattr(tower, "use_head", False) else None,
            block_output=block_output,
            block=shown,
            heads=tower.config.num_attention_heads,
            encoder=tower.config.model_type,
        )

    return features, shown(layers[0])


def _run(layers: Sequence[nn.Module], states: Tensor, reader: nn.Module) -> Tensor:
    """States [I, (1 +) N, D] after some layers, in the dtype of the module that reads them: what lies behind the
    feature layer is frozen, and perhaps kept in half precision while the layers before it are trained."""
    states = states.to(next(reader.parameters()).dtype)
    for layer in layers:
        states = layer(states, None)
    return states


def _pooling_projections(tower: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Query [I, D] and keys [I, N, D] inside SigLIP's pooling head, from the last layer's states [I, N, D]."""
    attention = tower.head.attention
    weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query = linear(tower.head.probe[0], weight[0], bias[0])  # [1, D], the same for every image
    keys = linear(tower.post_layernorm(states), weight[1], bias[1])
    return query.expand(len(states), -1), keys
