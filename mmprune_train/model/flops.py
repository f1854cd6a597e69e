"""Floating-point operations of a training step, counted from shapes and from the tokens that are there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmprune_train.model.language import computed_again
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.vision import deepest_feature, family_of, scored_block
from mmprune_train.pruning import PruningTrace


@dataclass(frozen=True)
class PassShape:
    """What one forward pass has to do; counts may be expectations."""

    lengths: Tensor
    """[layers, B] tokens of each sample that enter each LLM layer."""
    stage1: Tensor
    """[B] tokens that enter the LLM."""
    images: float
    """Images that are encoded."""
    kept_patches: float
    """Tokens that enter the projector."""
    supervised: float
    """Positions with logits."""
    questions: float = 0
    """Questions that go through the text tower, each of `question_length` tokens."""
    question_length: float = 0

    @classmethod
    def of(cls, trace: PruningTrace, images: int, supervised: int) -> PassShape:
        """The shape of the pass that left this trace, encoded `images` and had logits at `supervised` positions."""
        lengths, stage1 = torch.stack(trace.layers).double(), trace.stage1.double()
        return cls(lengths, stage1, images, sum(map(len, trace.vision_kept)), supervised, *trace.asked)


@dataclass(frozen=True)
class Flops:
    """Of a pass; multiply and add are counted apart."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0
    """Forward once more in the backward pass, under gradient checkpointing."""

    @property
    def total(self) -> float:
        """What the model needs, however it is run."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What the device does."""
        return self.total + self.recomputed

    @property
    def once(self) -> Flops:
        """Without recomputation."""
        return Flops(self.forward, self.backward)

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times, self.recomputed * times)


class StepFlops:
    """FLOPs of one forward and backward pass.

    A matrix of n weights costs 2n a token forward, 2n backward for its input where a gradient flows to that, and 2n
    more where it is trained. Attention over L tokens of width D costs 4 L^2 D forward, half of it where causal, and
    twice that backward. Stage 2 computes the keys of all tokens once more before each layer that it prunes before,
    where its score reads them; the few rows of queries are not counted, nor is what stage 1 computes beside the
    encoder's blocks (but for the matrices of a score's own weights, once a patch), nor norms, activations and other
    work without matrix products.

    Args:
        model: the network, frozen as it will be trained; its weights are counted here, once.
        as_counted: by the convention of `torch.utils.flop_counter`, which takes causal attention for whole and its
            backward pass for 5/2 of the forward one (kernels compute the attention weights anew): what a GPU's
            kernels are charged with there, to be compared with it.
    """

    def __init__(self, model: PackedLlava, as_counted: bool = False) -> None:
        self.attention_backward = 2.5 if as_counted else 2.0
        self.per_pair = 4 if as_counted else 2  # of one channel, causal, forward
        self.pruner = model.pruner
        self._count_vision(model)
        language: Any = model.hf.model.language_model
        projector, tower = model.hf.model.multi_modal_projector, model.hf.model.vision_tower
        flows = self.scores_train or any_trained(tower) or any_trained(projector) or any_trained(language.embed_tokens)
        width = language.config.num_attention_heads * language.layers[0].self_attn.head_dim
        per_token, per_pair = [], []
        for layer in language.layers:
            linears, attends, flows = self._layer(layer, flows, width)
            per_token.append(linears)
            per_pair.append(attends)
        self.per_token = per_token
        """Of each layer, per token."""
        self.per_token_pair = per_pair
        """Of each layer, per pair of tokens of a sample."""
        back = int(model.pruner.scores_previous_layer)
        keyed = model.pruner.layers(len(language.layers)) if model.pruner.reads_keys else {}
        self.per_scored_token = {index: 2 * _key_weights(language.layers[index - back].self_attn) for index in keyed}
        """Per token that reaches a pruning layer."""
        self.per_target = _linear(model.hf.lm_head, flows or any_trained(language.norm))

    def __call__(self, trace: PruningTrace, images: int, supervised: int) -> float:
        """FLOPs of the pass that left this trace, without recomputation; arguments as in `PassShape.of`."""
        return self.count(PassShape.of(trace, images, supervised)).total

    def count(self, shape: PassShape, checkpointing: str | None = None) -> Flops:
        """FLOPs of a pass, its layers run again in the backward pass as `computed_again` says of `checkpointing`."""
        again = computed_again(self.pruner, len(self.per_token), checkpointing)
        read = shape.question_length
        asked = self.per_question + read * self.per_question_token + read**2 * self.per_question_pair
        vision = self.vision if checkpointing else self.vision.once
        projected = shape.images * self.patches if self.pruner.merges_projected else shape.kept_patches
        total = vision * shape.images + self.per_projected_patch * projected
        total += Flops(shape.questions * asked)
        tokens, pairs = shape.lengths.sum(1).tolist(), shape.lengths.square().sum(1).tolist()
        for index, cost in enumerate(self.per_token):
            layer = cost * tokens[index] + self.per_token_pair[index] * pairs[index]
            total += layer if again[index] else layer.once
        reached = [float(shape.stage1.sum()), *tokens]  # before each layer's pruning: what the layer before had
        total += Flops(forward=sum(reached[index] * cost for index, cost in self.per_scored_token.items()))
        return total + self.per_target * shape.supervised

    def _count_vision(self, model: PackedLlava) -> None:
        tower, projector = model.hf.model.vision_tower, model.hf.model.multi_modal_projector
        family = family_of(tower.config.model_type)
        blocks: Any = family.layers(tower)
        depth = deepest_feature(model.config.vision_feature_layer, len(blocks))
        patches = model.config.image_seq_length
        length = patches + family.has_cls
        trained = any_trained(tower)
        self.scores_train = model.scorer is not None and any_trained(model.scorer)
        attention = 4 * length**2 * tower.config.hidden_size  # of one block
        self.vision = _linears(_matrices(tower.embeddings), False) * patches
        for block in blocks[:depth]:
            matrices = _matrices(block)
            cost = _linears(matrices, trained) * length + self._attended(attention, trained)
            self.vision += _recomputed(cost, length * size_of(matrices[-1].weight)) if trained else cost
        more = blocks[depth : _blocks_run(model, depth, len(blocks))]
        self.vision += Flops(forward=sum(2 * length * _weights(block) + attention for block in more))
        if model.scorer is not None:
            self.vision += _linears(_matrices(model.scorer), self.scores_train) * patches
        if model.pruner.projects:
            self.vision += Flops(forward=2 * patches * _weights(projector))
        self.per_question_token = self.per_question = self.per_question_pair = 0
        if model.question is not None:
            clip = model.question.clip
            self.vision += Flops(forward=2 * patches * _weights(clip.visual_projection))
            self.per_question_token = 2 * _weights(clip.text_model)
            self.per_question = 2 * _weights(clip.text_projection)
            text = clip.config.text_config
            self.per_question_pair = 2 * text.hidden_size * text.num_hidden_layers
        first, second = projector.linear_1, projector.linear_2
        self.patches = patches
        self.per_projected_patch = _linear(first, trained) + _linear(second, trained or any_trained(first))

    def _attended(self, forward: float, flows: bool) -> Flops:
        return Flops(forward, forward * self.attention_backward * flows)

    def _layer(self, layer: Any, flows: bool, width: int) -> tuple[Flops, Flops, bool]:
        """A decoder layer's cost per token and per pair of tokens, and whether a gradient flows through what it puts
        out, where `flows` says whether one does through what comes in."""
        inner, mlp = layer.self_attn, layer.mlp
        first = [inner.qkv_proj] if hasattr(inner, "qkv_proj") else [inner.q_proj, inner.k_proj, inner.v_proj]
        wide = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        cost = attention = Flops()
        for stage in (first, [inner.o_proj], wide, [mlp.down_proj]):  # each reads what the one before put out
            for part in stage:
                cost += _linear(part, flows)
            flows = flows or any(map(any_trained, stage))
            if stage is first:
                attention = self._attended(self.per_pair * width, flows)
        flows = flows or any_trained(layer)
        if not flows:
            return cost, attention, flows
        last = size_of(_matrices(mlp.down_proj)[-1].weight)
        return _recomputed(cost, last), _recomputed(attention, 0), flows


def _recomputed(cost: Flops, last: int) -> Flops:
    """With the forward pass that checkpointing repeats: it stops before the last product, whose result nobody needs."""
    return Flops(cost.forward, cost.backward, cost.forward - 2 * last)


def size_of(parameter: Any) -> int:
    """Elements of a weight, also of one that is in 4 bits or sharded over devices."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        return int(packed.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor behind


def _matrices(module: nn.Module) -> list[Any]:
    """The Linear and convolution layers inside."""
    return [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def _weights(module: nn.Module) -> int:
    return sum(size_of(part.weight) for part in _matrices(module))


def any_trained(module: nn.Module) -> bool:
    """Whether a gradient is taken of any weight inside."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _linears(parts: Iterable[Any], flows: bool) -> Flops:
    """Per token: `flows` says whether a gradient is wanted for the input of each."""
    total = Flops()
    for part in parts:
        size = 2 * size_of(part.weight)
        total += Flops(size, size * (flows + part.weight.requires_grad))
    return total


def _linear(module: Any, flows: bool) -> Flops:
    """Per token, of a Linear and of the low-rank adapters on it, the second of which reads the first."""
    seconds = [part for name, part in module.named_modules() if ".lora_B" in f".{name}" and isinstance(part, nn.Linear)]
    others = [part for part in _matrices(module) if not any(part is second for second in seconds)]
    return _linears(others, flows) + _linears(seconds, flows or any_trained(module))


def _key_weights(attention: Any) -> int:
    """Weights that the keys cost; a fused projection (Phi-3) is run whole."""
    return _weights(attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.k_proj)


def _blocks_run(model: PackedLlava, depth: int, blocks: int) -> int:
    """How many of the encoder's blocks run: the features' own `depth`, and those that stage 1's scores or merge ask."""
    run = depth
    for number, (layer, reads) in enumerate(model.pruner.vision_passes):
        if "probe_query_keys" in reads:
            return blocks
        block = scored_block(layer, depth, blocks)
        if (model.pruner.merges and number == 0) or reads & {"cls_query_keys", "patch_keys"}:
            run = max(run, block)  # what enters it
        if layer is not None and reads & {"question", "block_output"}:
            run = max(run, block + 1)  # what leaves it
    return run
