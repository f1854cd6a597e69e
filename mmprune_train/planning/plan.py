"""The plan of a training stage: one network on the meta device, a sample of lengths, and what follows from both."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import Config, StageConfig
from mmprune_train.devices import CPU, Device
from mmprune_train.model.build import build_on_meta
from mmprune_train.model.flops import Flops, PassShape, StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters
from mmprune_train.planning.activations import Activations
from mmprune_train.planning.layout import CUDA_OVERHEAD, FRAGMENTED, LAYOUTS, MASTER, numerics, states
from mmprune_train.planning.lengths import Tokens, count_tokens
from mmprune_train.planning.samples import StageSamples
from mmprune_train.training.freezing import Part, freeze
from mmprune_train.training.network import uses_adapters
from mmprune_train.training.stream import steps_of

DRAWN_BATCHES = 200
"""Micro-batches that are drawn from the sample; memory is that of the longest."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of the LLM, logits, vision tower and inputs, or the optimizer's own working set where that is more."""
    logits: float
    """The part of `activations` that the loss may take."""
    strategy: float
    """Buckets and gathered weights."""
    overhead: float
    """Context, libraries, fragmentation: assumed."""
    host: float = 0.0
    """In the host's memory for this device, not counted in `total`: what a strategy offloads."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.strategy + self.overhead


@dataclass(frozen=True)
class Cost:
    """Of one way to run a stage: dense, or as it is pruned."""

    tokens: Tokens
    flops: Flops
    """Of one optimizer step over all devices, the mean."""
    memory: Memory
    longest: float
    """Tokens that enter a layer, of the micro-batch that decides the memory."""
    longest_images: int
    """Images of that micro-batch."""

    def seconds(self, device: Device, mfu: float, world: int) -> float | None:
        """Of one optimizer step; None where the device's throughput is not known."""
        return None if device.tflops is None else self.flops.hardware / (device.tflops * 1e12 * mfu * world)


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    checkpoints: float
    model: float
    cache: float | None
    """Kept features of all images of the stage; None: the encoder is trained, or the images are not known."""


@dataclass(frozen=True)
class StagePlan:
    name: str
    parts: list[Part]
    strategy: str
    world: int
    micro_batches: int
    """Micro-batches of a step on each device."""
    steps: int | None
    """None: the number of samples is not known."""
    dense: Cost
    pruned: Cost | None
    """None: nothing is pruned."""
    disk: Disk

    @property
    def own(self) -> Cost:
        """As the stage will run."""
        return self.pruned or self.dense


def plan_stage(
    config: Config, name: str, data: StageSamples, share: float, device: Device, compute: torch.dtype
) -> StagePlan:
    """What stage `name` needs.

    Args:
        share: of its row, what a budget keeps that depends on the images.
        compute: dtype of matrix products.
    """
    stage = config.stage[name]
    adapters = uses_adapters(config, name)
    model = build_on_meta(config)
    if adapters:
        add_adapters(model, config.peft)
    parts = freeze(model, stage, adapters)
    world = config.trainer.devices * config.trainer.num_nodes
    strategy = stage.strategy or config.strategy.name
    planned = PlannedStage(config, stage, model, strategy, device, compute)
    patches, depth = model.config.image_seq_length, len(model.hf.model.language_model.layers)
    none = load_pruner("none")
    with model.pruned_by(none):
        own = without = planned.cost(count_tokens(none, data.samples, patches, depth, 1.0))
    pruned = None
    if config.pruner.vision.enabled or config.pruner.language.enabled:
        own = pruned = planned.cost(count_tokens(config.pruner, data.samples, patches, depth, share))
    steps = stage.max_steps
    if steps is None and data.total is not None:
        steps = steps_of(data.total, stage.epochs, stage.global_batch_size, None)
    passes, disk = micro_batches(own.tokens, stage, world), planned.disk(own.tokens, data)
    return StagePlan(name, parts, strategy, world, passes, steps, without, pruned, disk)


def micro_batches(tokens: Tokens, stage: StageConfig, world: int) -> int:
    """Forward passes of a step on each device; with a token budget about so many."""
    if stage.token_budget is None:
        return stage.global_batch_size // (stage.batch_size * world)
    return math.ceil(stage.global_batch_size * float(tokens.stage1.mean()) / (stage.token_budget * world))


def longest_batch(tokens: Tokens, stage: StageConfig) -> list[int]:
    """Rows of the samples of the longest of some micro-batches drawn by chance, of one modality where the stage groups
    by it."""
    rows = range(len(tokens.dense))
    groups = [list(rows)]
    if stage.group_by_modality:
        groups = [[row for row in rows if bool(tokens.images[row]) == wanted] for wanted in (True, False)]
        groups = [group for group in groups if len(group) >= stage.batch_size] or [list(rows)]
    chance = random.Random(0)
    size = stage.batch_size if stage.token_budget is None else stage.global_batch_size
    drawn = [chance.choices(group, k=size) for group in groups for _ in range(DRAWN_BATCHES)]
    if stage.token_budget is not None:
        drawn = [_within(batch, tokens, stage.token_budget) for batch in drawn]
    return max(drawn, key=lambda batch: float(tokens.layer_mean[batch].sum()))


def _within(batch: list[int], tokens: Tokens, budget: int) -> list[int]:
    """The first samples of a batch that enter the LLM together, at least one."""
    fitting = tokens.stage1[batch].cumsum(0) <= budget
    return batch[: max(1, int(fitting.sum()))]


def checkpointed(stage: StageConfig) -> str | None:
    """Which layers the backward pass runs again; None: none."""
    return stage.checkpointed_layers if stage.gradient_checkpointing else None


@dataclass(frozen=True)
class PlannedStage:
    """A stage's network, its weights on the meta device, and what it is to be trained with."""

    config: Config
    stage: StageConfig
    model: PackedLlava
    strategy: str
    device: Device
    compute: torch.dtype

    def cost(self, tokens: Tokens) -> Cost:
        """Of steps on samples that leave so many tokens."""
        samples, batch = len(tokens.dense), longest_batch(tokens, self.stage)
        flops = StepFlops(self.model).count(self._run(tokens.shape()), checkpointed(self.stage))
        memory = self._memory(self._run(tokens.shape(batch)))
        longest, images = float(tokens.layer_mean[batch].sum()), int(tokens.images[batch].sum())
        return Cost(tokens, flops * (self.stage.global_batch_size / samples), memory, longest, images)

    def _run(self, shape: PassShape) -> PassShape:
        """Samples of one image that a batch holds together need it encoded once; with the feature cache none is."""
        images = math.ceil(shape.images / self.stage.samples_per_image)
        kept = shape.kept_patches / max(shape.images, 1) * images
        encoded = 0 if self.config.trainer.feature_cache else images
        return PassShape(shape.lengths, shape.stage1, encoded, kept, shape.supervised)

    def _memory(self, shape: PassShape) -> Memory:
        """Of one device for a micro-batch of this shape."""
        layout, trainer = LAYOUTS[self.strategy], self.config.trainer
        how = numerics(layout, self.compute)
        world, cuda = trainer.devices * trainer.num_nodes, self.device.name != CPU
        kept = states(layout, self._on_device(), how, world, cuda, self._gathered(), self.in_four_bits())
        phases = Activations(self.model, how).phases(
            shape, checkpointed(self.stage), trainer.logits_chunk, trainer.vision_chunk, growing=False
        )
        activations = max(phases.peak, kept.stepping)
        overhead = CUDA_OVERHEAD + FRAGMENTED * activations if cuda else 0.0
        held = kept.weights, kept.gradients, kept.optimizer
        return Memory(*held, activations, phases.logits, kept.working, overhead, kept.host)

    def _on_device(self) -> Iterator[nn.Parameter]:
        """With the feature cache the vision tower stays on the host."""
        tower = self.model.hf.model.vision_tower if self.config.trainer.feature_cache else nn.Module()
        left = {id(parameter) for parameter in tower.parameters()}
        return (parameter for parameter in self.model.parameters() if id(parameter) not in left)

    def in_four_bits(self) -> int:
        """Weights that QLoRA quantises: of the decoder layers, all but the adapters."""
        if self.config.peft.name != "qlora" or not (self.stage.use_peft and self.stage.train_llm):
            return 0
        linears = (part for part in self.model.hf.model.language_model.layers.modules() if isinstance(part, nn.Linear))
        return sum(part.weight.numel() for part in linears if not part.weight.requires_grad)

    def _gathered(self) -> list[nn.Parameter]:
        """What FSDP2 holds whole at once: two of the LLM's layers, and all that is in none."""
        layers: Any = self.model.hf.model.language_model.layers
        inside = {id(parameter) for parameter in layers.parameters()}
        outside = [parameter for parameter in self._on_device() if id(parameter) not in inside]
        return [*outside, *layers[:2].parameters()]

    def disk(self, tokens: Tokens, data: StageSamples) -> Disk:
        """Of the stage, and of its features where a cache may keep them."""
        model, trainer = self.model, self.config.trainer
        layout = replace(LAYOUTS[self.strategy], offloads=False)
        how = numerics(layout, self.compute)
        whole = states(layout, model.parameters(), how, 1, False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        checkpoint = whole.optimizer + trained * (MASTER if layout.layered else how.trained.itemsize)
        cache = None
        if data.images is not None and not self.stage.train_vision:
            per_image = float(tokens.kept_patches.sum() / tokens.images.sum().clamp(min=1))
            width = model.hf.model.multi_modal_projector.linear_1.in_features
            cache = data.images * per_image * width * self.compute.itemsize
        return Disk(checkpoint * (trainer.keep_checkpoints + trainer.keep_best + 1), whole.weights, cache)
