"""Memory of one forward and backward pass above weights, gradients and optimizer, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import call
from typing import Any

import torch
from torch import Tensor, nn

from mmprune_train.model.flops import PassShape, any_trained
from mmprune_train.model.kernels import BACKENDS, Borders
from mmprune_train.model.language import computed_again
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.loss import cross_entropy_sum
from mmprune_train.model.vision import deepest_feature, family_of, states_read
from mmprune_train.planning.probe import Footprint, Numerics, Probe
from mmprune_train.pruning.language_scores import CHUNK

SDPA = BACKENDS[-1]
"""What attends in a probe: it runs on any device, and keeps for the backward pass what the other kernels keep."""


@dataclass(frozen=True)
class Phases:
    """Highest bytes in each phase of a pass, above what is there between two steps."""

    vision: float
    forward: float
    """Up to the loss."""
    backward: float
    logits: float
    """The loss's share of these two."""

    @property
    def peak(self) -> float:
        return max(self.vision, self.forward, self.backward)


class Activations:
    """The memory of a pass through a network, by its shape.

    The parts (decoder layer, norm, head with loss, projector, block of the vision tower) are probed; how they follow
    each other is walked here as `PackedLlava.forward_packed` runs them.

    Args:
        model: on the meta device, frozen as it will be trained.
    """

    def __init__(self, model: PackedLlava, how: Numerics) -> None:
        self.model, self.how = model, how
        language: Any = model.hf.model.language_model
        self.language, self.lm_head = language, model.hf.lm_head
        tower, projector = model.hf.model.vision_tower, model.hf.model.multi_modal_projector
        self.family = family_of(tower.config.model_type)
        self.blocks = self.family.layers(tower)
        features = model.config.vision_feature_layer
        self.depth = deepest_feature(features, len(self.blocks))
        self.held = len(states_read(features, model.pruner.blocks, len(self.blocks)))
        """States of the vision tower that are there when a block runs."""
        self.tower_trained = any_trained(tower)
        self.width, self.bytes = language.config.hidden_size, how.compute.itemsize
        embeds = how.trained if any_trained(language.embed_tokens) else how.compute
        self.stream = embeds.itemsize
        """Bytes of a state's number on its way through the layers."""
        scored = model.scorer is not None and any_trained(model.scorer)
        self.per_scored_image = 2 * 4 * int(model.config.image_seq_length) * tower.config.hidden_size * scored
        """Bytes that a score which is trained keeps of an image: its patches in fp32, and the same normalised. An
        assumption, where the score is the user's own."""
        enters = self.tower_trained or any_trained(projector) or any_trained(language.embed_tokens) or scored
        leaves = enters or any_trained(language)
        layer = partial(_decoder_layer, language.config)
        first = language.layers[0]
        self.first = Probe(first, layer, self.width, embeds, enters, how)
        self.layer = self.first if enters == leaves else Probe(first, layer, self.width, embeds, leaves, how)
        self.norm = Probe(language.norm, call, self.width, embeds, leaves, how)
        self.head = Probe(model.hf.lm_head, _loss, self.width, embeds, leaves, how)
        features = projector.linear_1.in_features
        self.projector = Probe(projector, call, features, how.compute, self.tower_trained, how)
        self.patches = int(model.config.image_seq_length)
        self.side = self.patches + self.family.has_cls
        block: Any = self.blocks[0]
        towers = tower.config.hidden_size
        states = how.trained if self.tower_trained else how.compute
        self.block = Probe(block, partial(_vision_block, self.side), towers, states, self.tower_trained, how)
        self.per_image = self.side * towers * states.itemsize
        """Bytes of the states of one image in the vision tower."""
        self.pixels = 3 * model.config.vision_config.image_size**2 * 4
        self.scored = set(model.pruner.layers(len(language.layers))) if model.pruner.reads_keys else set()

    def phases(
        self,
        shape: PassShape,
        checkpointing: str | None = None,
        logits_chunk: int | None = None,
        vision_chunk: int = 64,
        growing: bool = False,
    ) -> Phases:
        """Memory of one micro-batch.

        Args:
            shape: of the micro-batch.
            checkpointing: which layers keep their input alone and are run again: `all`, `before`, `after`; None: none.
            logits_chunk: supervised positions whose logits exist at once; None: all.
            vision_chunk: images per pass of the vision tower.
            growing: gradients of weights do not exist before the backward pass (the first micro-batch of a step) and
                are counted here as they come.
        """
        inputs = shape.images * self.pixels + float(shape.stage1.sum()) * 9 * 8  # nine int64 fields a token
        whole = self.model.pruner.merges_projected
        projector = self.projector(shape.images * self.patches if whole else shape.kept_patches)
        tower = self._tower(shape.images, vision_chunk, checkpointing is not None)
        again = computed_again(self.model.pruner, len(shape.lengths), checkpointing)
        held = inputs + projector.saved + tower.saved + shape.images * self.per_scored_image
        rows = shape.lengths.sum(1).tolist()
        parts = [(self.layer if index else self.first)(count) for index, count in enumerate(rows)]
        states = [count * self.width * self.stream for count in rows]
        kept = [states[i] if again[i] else part.saved for i, part in enumerate(parts)]
        rotary = self.language.layers[0].self_attn.head_dim
        held += sum(2 * count * rotary * self.stream for count in sorted(set(rows)))
        copies = self._cast_weights() if any(again) else 0.0
        highest = held + 3 * states[0]  # embeddings, and the same with patches in their places
        live = held + copies
        for index, (part, more) in enumerate(zip(parts, kept, strict=True)):
            if index in self.scored:
                before = shape.lengths[max(index - 1, 0)]
                highest = max(highest, live + 2 * states[index - 1] + self._scoring(before))
            highest = max(highest, live + (part.plain if again[index] else part.forward))
            live += more
        norm = self.norm(rows[-1])
        live += norm.saved + states[-1]
        head = self._head(shape.supervised, logits_chunk)
        forward = max(highest, live + head.forward)
        live -= copies
        backward = live + head.saved + head.backward
        live += states[-1] + norm.backward  # the gradient of what enters the norm
        backward = max(backward, live)
        live -= norm.saved + states[-1] + norm.backward
        tied = self.lm_head.weight is self.language.embed_tokens.weight
        # a gradient that has two sources waits for the second, and is summed into a third tensor
        gradients = self._weight_gradients(self.lm_head) if growing or tied else 0.0
        for index in reversed(range(len(parts))):
            part = parts[index]
            worst = max(part.forward, part.saved + part.backward) - part.saved * (not again[index])
            backward = max(backward, live + gradients + states[index] + worst)
            live -= kept[index]
            gradients += self._weight_gradients(self.language.layers[0]) if growing else 0.0
        embedding = self._weight_gradients(self.language.embed_tokens)  # dense, whatever was read
        last = max(embedding * (1 + tied), projector.backward + tower.backward)
        backward = max(backward, live + gradients + states[0] + last)
        return Phases(inputs + tower.forward, forward, backward, max(head.forward, head.saved + head.backward))

    def _tower(self, images: float, chunk: int, checkpointing: bool) -> Footprint:
        """The vision tower, which holds the states that are read later as long as a chunk runs."""
        some = min(images, chunk)
        block = self.block(some * self.side)
        between = self.held * some * self.per_image + some * self.pixels * self.bytes / 4
        features = images * self.per_image
        if not self.tower_trained:
            return Footprint(0.0, between + block.plain + features)
        whole = self.block(images * self.side)
        saved = self.depth * (images * self.per_image if checkpointing else whole.saved)
        return Footprint(saved, saved + whole.forward, 0.0, whole.backward + whole.saved * checkpointing)

    def _head(self, supervised: float, chunk: int | None) -> Footprint:
        chosen = supervised * self.width * self.stream
        if chunk is None or supervised <= chunk:
            return self.head(supervised)
        one = self.head(chunk)
        return Footprint(2 * chosen, one.forward + 2 * chosen, 0.0, one.saved + one.backward)

    def _scoring(self, lengths: Tensor) -> float:
        """Attention weights that stage 2's score holds at once, and a copy, as if every token asked."""
        return 2 * 4 * min(CHUNK, self.language.config.num_attention_heads * float(lengths.square().sum()))

    def _cast_weights(self) -> float:
        """Copies of trained matrices in the dtype of autocast, which live as long as it."""
        if not self.how.autocast:
            return 0.0
        trained = (p for p in self.language.layers.parameters() if p.requires_grad and p.dim() > 1)
        return sum(p.numel() for p in trained) * self.bytes

    def _weight_gradients(self, module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters() if p.requires_grad) * self.how.trained.itemsize


def _loss(head: Any, states: Tensor) -> Tensor:
    """As the network takes it: of supervised positions, in one chunk."""
    target = torch.zeros(len(states), dtype=torch.long)
    return cross_entropy_sum(head, states, target, len(states))


def _decoder_layer(config: Any, layer: Any, states: Tensor) -> Tensor:
    count = len(states)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = int(width * ((config.rope_parameters or {}).get("partial_rotary_factor") or 1))
    table = torch.empty((1, count, rotary), dtype=states.dtype)
    return layer(
        states[None],
        attention_mask=None,
        position_ids=torch.arange(count)[None],
        cache=None,
        use_cache=False,
        position_embeddings=(table, table),
        borders=Borders(torch.tensor([0, count], dtype=torch.int32), [count], SDPA),
    )[0]


def _vision_block(side: int, block: Any, states: Tensor) -> Tensor:
    return block(states.view(-1, side, states.shape[-1]), None)
