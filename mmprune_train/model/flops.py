"""Floating-point operations of a training step, counted from shapes and from the tokens that were really there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mmprune_train.config.pruner import TEXT_SCORES, stage_one_scores
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.vision import deepest_feature, family_of, scored_block
from mmprune_train.pruning import PruningTrace

KEYED_SCORES = ("text_attention", "last_token_attention", "key_norm")
"""Stage-2 scores that read a layer's keys."""


def _size(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor behind


def _matmul(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Weights of the Linear and convolution layers inside, and those of them that are trained."""
    total = trained = 0
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                total += _size(part.weight)
                trained += _size(part.weight) * part.weight.requires_grad
    return total, trained


def _any_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class StepFlops:
    """FLOPs of one forward and backward pass (multiply and add counted apart), without recomputation.

    A matrix of n weights costs 2n a token forward, 2n backward for its input where a gradient flows through it, and 2n
    more where it is trained. Attention over L tokens of width D costs 4 L^2 D forward (half of it where causal) and
    twice that backward. Stage 2 computes the keys of all tokens once more before each layer that it prunes before,
    where its score reads them; the few rows of queries are not counted.

    Args:
        model: the network, frozen as it will be trained; its weights are counted here, once.
    """

    def __init__(self, model: PackedLlava) -> None:
        language, tower = model.hf.model.language_model, model.hf.model.vision_tower
        projector, head = model.hf.model.multi_modal_projector, model.hf.lm_head
        blocks = family_of(tower.config.model_type).layers(tower)
        depth = deepest_feature(model.config.vision_feature_layer, len(blocks))
        patches = model.config.image_seq_length + 1
        vision = _any_trained(tower)
        through = vision or _any_trained(projector) or _any_trained(language)
        self.per_image = patches * _cost(_matmul(blocks[:depth]), vision)
        attention = 4 * patches**2 * tower.config.hidden_size  # of one layer
        self.per_image += depth * attention * (3 if vision else 1)
        more = blocks[depth : _blocks_run(model, depth, len(blocks))]  # forward alone
        self.per_image += 2 * patches * _matmul(more)[0] + len(more) * attention
        if model.pruner.projects:
            self.per_image += 2 * model.config.image_seq_length * _matmul([projector])[0]
        self.per_question_token = self.per_question = self.per_question_pair = 0
        if model.question is not None:
            clip = model.question.clip
            self.per_image += 2 * model.config.image_seq_length * _matmul([clip.visual_projection])[0]
            self.per_question_token = 2 * _matmul([clip.text_model])[0]
            self.per_question = 2 * _matmul([clip.text_projection])[0]
            text = clip.config.text_config
            self.per_question_pair = 2 * text.hidden_size * text.num_hidden_layers
        self.per_kept_patch = _cost(_matmul([projector]), vision)
        self.per_token = torch.tensor([_cost(_matmul([layer]), through) for layer in language.layers]).double()
        width = language.config.num_attention_heads * language.layers[0].self_attn.head_dim
        self.per_token_pair = 2 * width * (3 if through else 1)
        stage, back = model.pruner.settings.language, int(model.pruner.looks_back)
        looks = stage.score in KEYED_SCORES or ":" in stage.score
        keyed = model.pruner.layers(len(language.layers)) if looks else {}
        self.per_scored_token = {index: 2 * _key_weights(language.layers[index - back].self_attn) for index in keyed}
        """Per token that reaches a pruning layer."""
        self.per_target = _cost((_size(head.weight), _size(head.weight) * head.weight.requires_grad), through)

    def __call__(self, trace: PruningTrace, images: int, supervised: int) -> float:
        """FLOPs of the pass that left this trace.

        Args:
            trace: what the pass kept. images: images encoded. supervised: positions with logits.
        """
        lengths = torch.stack(trace.layers).double()  # [layers, B]
        total = images * self.per_image + sum(map(len, trace.vision_kept)) * self.per_kept_patch
        questions, read = trace.asked
        total += questions * (self.per_question + read * self.per_question_token + read**2 * self.per_question_pair)
        total += float((lengths.sum(1) * self.per_token).sum() + (lengths**2).sum() * self.per_token_pair)
        reached = [trace.stage1, *trace.layers]  # tokens before each layer's pruning are those of the layer before
        total += sum(float(reached[index].sum()) * cost for index, cost in self.per_scored_token.items())
        return total + supervised * self.per_target


def _key_weights(attention: Any) -> int:
    """Weights that the keys cost; a fused projection (Phi-3) is run whole."""
    return _matmul([attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.k_proj])[0]


def _blocks_run(model: PackedLlava, depth: int, blocks: int) -> int:
    """How many of the encoder's blocks run: the features' own `depth`, and those that stage 1's scores or merge ask."""
    stage = model.pruner.settings.vision
    scores = {score for _, score in stage_one_scores(stage)}
    if "map_attention" in scores:
        return blocks
    block = scored_block(stage.layer, depth, blocks)
    run = depth
    own = any(":" in score for score in scores)  # a user's score may read it
    if model.pruner.merges or own or scores & {"cls_attention", "cls_attention_wide"}:
        run = max(run, block)  # what enters it
    if stage.layer is not None and scores & set(TEXT_SCORES):
        run = max(run, block + 1)  # what leaves it
    return run


def _cost(weights: tuple[int, int], gradient: bool) -> int:
    total, trained = weights
    return 2 * (total + total * gradient + trained)
