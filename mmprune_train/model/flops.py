"""Floating-point operations of a training step, counted from shapes and from the tokens that were really there."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.vision import family_of
from mmprune_train.pruning import PruningTrace


def _matmul(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Weights of the Linear and convolution layers inside, and those of them that are trained."""
    total = trained = 0
    for module in modules:
        for part in module.modules():
            weight = getattr(part, "weight", None)
            if isinstance(part, nn.Linear | nn.Conv2d) and weight is not None:
                total += weight.numel()
                trained += weight.numel() if weight.requires_grad else 0
    return total, trained


def step_flops(model: PackedLlava, trace: PruningTrace, images: int, supervised: int) -> float:
    """FLOPs of one forward and backward pass (multiply and add counted apart), without recomputation.

    A matrix of n weights costs 2n a token forward, 2n backward for its input where a gradient flows through it, and 2n
    more where it is trained. Attention costs 4 L^2 D forward over causal halves, twice that backward.

    Args:
        trace: what the pass kept. images: images encoded. supervised: positions with logits.
    """
    hf = model.hf
    language, tower, projector = hf.model.language_model, hf.model.vision_tower, hf.model.multi_modal_projector
    layers = family_of(tower.config.model_type).layers(tower)
    feature = model.config.vision_feature_layer
    deepest = max(feature if isinstance(feature, list) else [feature])
    depth = deepest if deepest >= 0 else len(layers) + 1 + deepest
    patches = model.config.image_seq_length + 1

    def cost(tokens: float, weights: tuple[int, int], gradient: bool) -> float:
        total, trained = weights
        return 2 * tokens * (total + (total if gradient else 0) + trained)

    vision_trained = any(p.requires_grad for p in tower.parameters())
    encoder = cost(images * patches, _matmul(layers[:depth]), vision_trained)
    width = tower.config.hidden_size
    encoder += depth * images * 4 * patches**2 * width * (3 if vision_trained else 1)
    kept = sum(map(len, trace.vision_kept))
    total = encoder + cost(kept, _matmul([projector]), vision_trained)

    through = any(p.requires_grad for p in projector.parameters()) or vision_trained
    through = through or any(p.requires_grad for p in language.parameters())
    heads_width = language.config.num_attention_heads * language.layers[0].self_attn.head_dim
    for layer, lengths in zip(language.layers, trace.layers, strict=True):
        total += cost(float(lengths.sum()), _matmul([layer]), through)
        total += 2 * float((lengths.double() ** 2).sum()) * heads_width * (3 if through else 1)
    return total + cost(
        supervised, (hf.lm_head.weight.numel(), hf.lm_head.weight.numel() * hf.lm_head.weight.requires_grad), through
    )
