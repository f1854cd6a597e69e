"""QLoRA: the decoder layers in 4 bits while training, plain again after it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_inputs, tiny_llava
from torch import nn

from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import PeftConfig
from mmprune_train.data import sources
from mmprune_train.devices import device_peak
from mmprune_train.errors import UserError
from mmprune_train.model import quantize
from mmprune_train.model.build import build_on_meta
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters, merge_adapters
from mmprune_train.model.quantize import BYTES, check_quantization, is_quantized, quantize_linears, weight_of
from mmprune_train.planning.layout import LAYOUTS, numerics, states
from mmprune_train.planning.plan import PlannedStage
from mmprune_train.pruning import Pruner
from mmprune_train.tasks import train
from mmprune_train.training.freezing import freeze


@pytest.mark.parametrize(
    ("accelerator", "installed", "missing"),
    [("cpu", True, "without a CUDA device"), ("cuda", False, "without bitsandbytes"), ("cpu", False, "and without")],
)
def test_what_is_missing_is_named_with_the_remedy(
    accelerator: str, installed: bool, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda _: object() if installed else None)
    with pytest.raises(UserError, match=f"{missing}.*peft=lora"):
        check_quantization(accelerator)


def test_cuda_and_bitsandbytes_are_all_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda _: object())
    check_quantization("cuda")


def test_off_cuda_a_run_ends_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(sources, "prepare_data", lambda *_: pytest.fail("it prepared data"))
    monkeypatch.setenv("MMPRUNE_CACHE", str(tmp_path / "cache"))  # where nothing is yet
    config = compose_config(
        ["+experiment=smoke", "peft=qlora", "peft.r=8", "trainer.accelerator=cpu", f"runs_dir={tmp_path}/runs"]
    )
    with pytest.raises(UserError, match="peft=qlora: this run is without a CUDA device"):
        train.run(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("strategy", ["strategy=deepspeed_zero3", "stage.instruct.strategy=deepspeed_zero3"])
def test_strategies_that_spread_frozen_weights_are_refused(strategy: str) -> None:
    with pytest.raises(UserError, match=r"peft=qlora: strategy=deepspeed_zero3.*deepspeed_zero2"):
        compose_config(["+experiment=smoke", "peft=qlora", strategy])


def test_decoder_layers_lie_in_four_bits_and_merge_out_of_them() -> None:
    pytest.importorskip("bitsandbytes")
    check_four_bits(torch.device("cpu"))


def check_four_bits(device: torch.device) -> None:
    """What is quantised, trained and merged on the device."""
    model = PackedLlava(tiny_llava(), Pruner(load_pruner("none")))
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    add_adapters(model, PeftConfig(name="qlora", r=4, alpha=8, dropout=0.0, target_modules=["q_proj"]), torch.float32)
    model.to(device)
    packed = {
        n.removesuffix(".base_layer") for n, p in model.named_modules() if hasattr(p, "weight") and is_quantized(p)
    }
    assert packed == {name for name in linears if ".language_model.layers." in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == set()
    inputs = {name: value.to(device) for name, value in tiny_inputs([1], [9]).items()}
    model.train()
    adapted = model(**inputs).logits
    adapted.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    merge_adapters(model.hf)
    with torch.no_grad():
        merged = model(**inputs).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    after = dict(model.named_modules())
    assert {type(after[name]) for name in packed} == {nn.Linear}
    assert set(model.hf.state_dict()) == set(tiny_llava().state_dict())


def test_rounding_to_four_bits_costs_a_tenth_of_a_weight() -> None:
    pytest.importorskip("bitsandbytes")
    layers = nn.Sequential(nn.Linear(256, 128))  # bitsandbytes' blocks are 64 wide
    weight = layers[0].weight.detach().clone()
    quantize_linears(layers, torch.float32)
    error = weight_of(layers.to("cpu")[0]) - weight
    assert is_quantized(layers[0]) and layers[0].weight.numel() == weight.numel() // 2
    assert 0.03 < error.norm() / weight.norm() < 0.12


def test_a_plan_counts_four_bits_for_the_decoder_layers_alone() -> None:
    config = compose_config(["+experiment=llava7b_twostage_lora", "peft=qlora", "strategy=deepspeed_zero2"])
    model = build_on_meta(config)
    add_adapters(model, config.peft)
    stage = config.stage["instruct"]
    freeze(model, stage, adapters=True)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    setting = (model, "deepspeed_zero2", device_peak("a100_80gb"), torch.bfloat16)
    assert PlannedStage(config, stage, *setting).in_four_bits() == weights
    assert PlannedStage(config, config.stage["pretrain"], *setting).in_four_bits() == 0
    layout, parameters = LAYOUTS["deepspeed_zero2"], list(model.parameters())
    how = numerics(layout, torch.bfloat16)
    whole = states(layout, parameters, how, 8, True)
    packed = states(layout, parameters, how, 8, True, quantized=weights)
    assert whole.weights - packed.weights == pytest.approx(weights * (2 - BYTES))
    assert (packed.gradients, packed.optimizer) == (whole.gradients, whole.optimizer)


def test_a_weight_takes_little_more_than_half_a_byte() -> None:
    assert pytest.approx(0.516, abs=1e-3) == BYTES
