"""The plan beside a pass of SmolLM2-135M and DINOv2-S at 336 px, random weights: FLOPs to 2 %, memory to 15 %."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from planning.measured import peak_of_pass
from transformers import AutoConfig, LlavaForConditionalGeneration

from mmprune_train.benchmark.counters import flop_counter
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import PeftConfig, StageConfig
from mmprune_train.data.batch import Batch, Sample, collate
from mmprune_train.data.encode import Example
from mmprune_train.model.assemble import llava_config
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters
from mmprune_train.planning.activations import Activations
from mmprune_train.planning.layout import LAYOUTS, numerics
from mmprune_train.pruning import IGNORE, Kind, Pruner
from mmprune_train.training.freezing import freeze, store_frozen
from mmprune_train.training.precision import hardware_bf16

pytestmark = pytest.mark.slow

PATCHES, SIDE = 576, 336
PRUNED = {
    "name": "twostage",
    "vision": {"knee": {"method": "fixed_ratio", "ratio": 0.3}},
    "language": {"knee": {"method": "fixed_ratio", "ratio": 0.5}},
}


@pytest.fixture(scope="module")
def untrained() -> tuple[LlavaForConditionalGeneration, int]:
    """The network, and the id of its image token."""
    config = compose_config(["+experiment=throughput"])
    torch.manual_seed(0)
    vision, text = AutoConfig.for_model(**config.encoder.arch), AutoConfig.for_model(**config.llm.arch)
    token = text.vocab_size
    text.vocab_size = token + 64
    return LlavaForConditionalGeneration(llava_config(config.encoder, vision, text, "mlp2x_gelu", token)), token


def one_batch(token: int) -> Batch:
    """Two images with a question and an answer each, and a text-only sample."""
    samples = []
    for number, (images, question, answer) in enumerate([(1, 20, 30), (1, 40, 5), (0, 60, 25)]):
        kinds = [Kind.SPECIAL] + [Kind.VISUAL] * PATCHES * images + [Kind.PROMPT] * question + [Kind.ANSWER] * answer
        kind = torch.tensor([int(k) for k in kinds])
        ids = torch.randint(5, 1000, kind.shape).masked_fill(kind == Kind.VISUAL, token)
        labels = torch.where(kind == Kind.ANSWER, ids, IGNORE)
        example = Example(str(number), ids, kind, torch.ones_like(ids), labels, images)
        pixels = [torch.randn(3, SIDE, SIDE) for _ in range(images)]
        samples.append(Sample(example, [Path(f"{number}.png")] * images, pixels))
    return collate(samples)


NATIVE, WHY = hardware_bf16("cpu")
EMULATED = pytest.mark.skipif(not NATIVE, reason=f"bf16 takes minutes a pass: {WHY}")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=EMULATED)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pruner", ["none", PRUNED], ids=["dense", "pruned"])
@pytest.mark.parametrize("trained", ["full", "lora", "frozen"])
def test_the_plan_agrees_with_a_pass(
    trained: str, pruner: object, dtype: torch.dtype, untrained: tuple[LlavaForConditionalGeneration, int]
) -> None:
    hf, token = untrained
    batch = one_batch(token)

    def network() -> PackedLlava:
        model = PackedLlava(copy.deepcopy(hf), Pruner(load_pruner(pruner)), template="chat")
        if trained == "lora":
            add_adapters(model, PeftConfig(name="lora", r=32, dropout=0.0))
        freeze(model, StageConfig(train_projector=True, train_llm=trained != "frozen"), trained == "lora")
        store_frozen(model, dtype)
        return model

    model, bare = network(), network().to("meta")
    bare.hf.lm_head.weight = bare.hf.model.language_model.embed_tokens.weight  # tied, which `to` undoes
    half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with model.executed(attention="sdpa_per_sample"), flop_counter() as counted, half:
        model.forward_packed(batch.sequence, batch.pixel_values).loss_sum.backward()
    model.zero_grad()
    peak, shape = peak_of_pass(model, batch.sequence, batch.pixel_values, dtype)
    assert StepFlops(model, as_counted=True).count(shape).total == pytest.approx(counted.get_total_flops(), rel=0.02)
    phases = Activations(bare, numerics(LAYOUTS["single"], dtype)).phases(shape, growing=True)
    assert batch.pixel_values is not None
    were_there = batch.pixel_values.nbytes + 72 * float(shape.stage1.sum())
    assert phases.peak - were_there == pytest.approx(peak, rel=0.15)
