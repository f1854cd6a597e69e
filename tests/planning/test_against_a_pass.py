"""The plan's FLOPs and memory against what torch counts and what a real pass takes."""

from __future__ import annotations

import copy

import pytest
import torch
from planning.measured import peak_of_pass
from tiny import IMAGE_TOKEN, PATCHES, annotate, labels_of, packed, tiny_inputs, tiny_llava

from mmprune_train.benchmark.counters import flop_counter
from mmprune_train.config.schema import PeftConfig, StageConfig
from mmprune_train.model.flops import PassShape, StepFlops
from mmprune_train.model.inputs import pack
from mmprune_train.model.language import checkpoint_layers
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters
from mmprune_train.planning.activations import Activations
from mmprune_train.planning.layout import LAYOUTS, numerics
from mmprune_train.pruning import PackedSequence
from mmprune_train.training.freezing import freeze

TRAINED = {
    "full": {"train_llm": True},
    "lora": {"train_llm": True},
    "frozen": {},
    "vision": {"train_vision": True},
}
PRUNED = {"name": "fastv", "language": {"knee": {"ratio": 0.2}}}
SCORED = {"name": "learned", "vision": {"knee": {"ratio": 0.5}}}
WAYS = [
    pytest.param(pruner, checkpointing, id=f"{name}-{checkpointing}")
    for name, pruner, found in (("dense", "none", ()), ("pruned", PRUNED, ("before", "after")), ("scored", SCORED, ()))
    for checkpointing in (None, "all", *found)
]
"""Without a pruning layer all layers are before it."""


def network(trained: str, pruner: object, text: str = "llama", checkpointing: str | None = None) -> PackedLlava:
    model = packed(tiny_llava("clip", text), pruner)
    if trained == "lora":
        add_adapters(model, PeftConfig(name="lora", r=8, dropout=0.0))
    freeze(model, StageConfig(**TRAINED[trained]), trained == "lora")
    if checkpointing:
        checkpoint_layers(model, checkpointing)
    return model


def batch() -> tuple[PackedSequence, torch.Tensor]:
    """Text-only samples, several images, answers that are a part of the text."""
    images, text = [4, 3, 0, 1] * 3, [30, 40, 20, 60] * 3
    inputs = tiny_inputs(images, text)
    labels = labels_of(inputs)
    labels[:, :40] = -100
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    sequence = pack(ids, valid, sum(images), IMAGE_TOKEN, labels, annotate, features=PATCHES)
    return sequence, inputs["pixel_values"]


@pytest.mark.parametrize(("pruner", "checkpointing"), WAYS)
@pytest.mark.parametrize("trained", TRAINED)
def test_flops_agree_with_the_counter(trained: str, pruner: object, checkpointing: str | None) -> None:
    model = network(trained, pruner, "phi3" if trained == "lora" else "llama", checkpointing)
    sequence, pixels = batch()
    with flop_counter() as counted:
        output = model.forward_packed(sequence, pixels)
        output.loss_sum.backward()
    shape = PassShape.of(output.trace, output.trace.encoded, int(output.supervised))
    found = StepFlops(model, as_counted=True).count(shape, checkpointing)
    assert found.hardware == pytest.approx(counted.get_total_flops(), rel=0.02)
    assert (found.recomputed > 0) == (checkpointing is not None)


@pytest.mark.parametrize(("pruner", "checkpointing"), WAYS)
@pytest.mark.parametrize("trained", TRAINED)
def test_memory_agrees_with_a_pass(trained: str, pruner: object, checkpointing: str | None) -> None:
    model = network(trained, pruner, checkpointing=checkpointing)
    sequence, pixels = batch()
    peak, shape = peak_of_pass(model, sequence, pixels)
    bare = copy.deepcopy(network(trained, pruner)).to("meta")
    found = Activations(bare, numerics(LAYOUTS["single"], torch.float32)).phases(shape, checkpointing, growing=True)
    inputs = pixels.nbytes + 72 * float(shape.stage1.sum())  # were there before
    assert found.peak - inputs == pytest.approx(peak, rel=0.15)


def test_pruning_saves_memory_in_the_ratio_of_tokens() -> None:
    """At least, within 15 %: the measured peak of a pass above the weights, and the planned one."""
    measured, planned, tokens = [], [], []
    for pruner in ("none", {"name": "encoder_only", "vision": {"knee": {"method": "fixed_count", "count": 2}}}):
        model = network("frozen", pruner)
        peak, shape = peak_of_pass(model, *batch())
        bare = copy.deepcopy(network("frozen", pruner)).to("meta")
        measured.append(peak)
        planned.append(Activations(bare, numerics(LAYOUTS["single"], torch.float32)).phases(shape).peak)
        tokens.append(float(shape.lengths.mean(0).sum()))
    ratio = tokens[1] / tokens[0]
    assert measured[1] / measured[0] <= 1.15 * ratio
    assert planned[1] / planned[0] == pytest.approx(ratio, rel=0.15)
