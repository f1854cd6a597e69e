"""LoRA added in place against PEFT's own forward pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from model.adapted import adapted
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_llava
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training.short import Loader

from mmprune_train.benchmark.baseline import as_transformers
from mmprune_train.model.language import checkpoint_layers, compile_layers
from mmprune_train.model.lora import add_in_place, adds_in_place, as_peft_adds

WIDE, TOKENS = 48, 7


def adapted_linear(
    dropout: float = 0.0, dtype: torch.dtype = torch.float32, bias: bool = True, **more: Any
) -> nn.Sequential:
    """A frozen Linear with an adapter that is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, WIDE, bias=bias)).to(dtype)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=3, lora_dropout=dropout, target_modules=["0"], **more), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.detach().float().normal_()
    add_in_place(model)
    return model


def passed(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    torch.manual_seed(1)
    model.zero_grad()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", [(1, TOKENS, 16), (3, TOKENS, 16), (TOKENS, 16)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...], dropout: float, bias: bool) -> None:
    model = adapted_linear(dropout, bias=bias)
    found = passed(model, shape, torch.float32)
    with as_peft_adds(model):
        expected = passed(model, shape, torch.float32)
    assert len(found) == 4
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("autocast", [True, False])
def test_frozen_bf16_weights_with_fp32_adapters_as_in_peft(autocast: bool) -> None:
    model = adapted_linear(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found = passed(model, (1, TOKENS, 16), torch.bfloat16)
        with as_peft_adds(model):
            expected = passed(model, (1, TOKENS, 16), torch.bfloat16)
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-2 * float(theirs.abs().max()), rtol=0)


class Wide(TorchDispatchMode):
    """Notes the operations whose result is as large as the layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == TOKENS * WIDE and not func.is_view:
            self.seen.append(str(func.overloadpacket).removeprefix("aten."))
        return out


def test_only_the_two_products_pass_over_the_output() -> None:
    model, x = adapted_linear(bias=False), torch.randn(1, TOKENS, 16)
    with torch.no_grad(), Wide() as passes:
        model(x)
    with as_peft_adds(model), torch.no_grad(), Wide() as theirs:
        model(x)
    assert [name for name in passes.seen if "unsafe_view" not in name] == ["mm", "baddbmm_"]
    assert [name for name in theirs.seen if "unsafe_view" not in name] == ["mm", "mm", "mul", "add"]


@pytest.mark.parametrize("safe", [True, False])
def test_merged_and_unmerged_again(safe: bool) -> None:
    model, x = adapted_linear(), torch.randn(1, TOKENS, 16)
    layer: Any = model[0]
    with torch.no_grad():
        plain, before = layer.base_layer.weight.clone(), model(x)
        layer.merge(safe_merge=safe)
        torch.testing.assert_close(layer.base_layer(x), before, atol=1e-5, rtol=1e-5)
        layer.unmerge()
        torch.testing.assert_close(layer.base_layer.weight, plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_other_kinds_of_adapters_stay_as_they_are() -> None:
    dora, with_bias = adapted_linear(use_dora=True), adapted_linear(lora_bias=True)
    assert type(dora[0].lora_variant["default"]).__name__ == "DoraLinearVariant" and not with_bias[0].lora_variant
    assert dora[0].cast_input_dtype_enabled


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_models_lora_adds_in_place_but_not_in_the_baseline(kind: str) -> None:
    model = adapted(tiny_llava(), kind)
    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    before = [adds_in_place(layer) for layer in layers]
    assert len(layers) == 4 * 7 and set(before) == {kind == "lora"}
    with pytest.raises(KeyError), as_transformers(model):
        assert not any(adds_in_place(layer) for layer in layers)
        assert all(layer.cast_input_dtype_enabled for layer in layers)
        raise KeyError
    assert [adds_in_place(layer) for layer in layers] == before


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("how", ["plain", "recomputed", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_has_pefts_gradients(text: str, how: str, autocast: bool) -> None:
    model = adapted(tiny_llava(text=text)).train()
    batch = next(Loader(4).epoch(0, 0))
    if how == "recomputed":
        checkpoint_layers(model, "all")

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.forward_packed(batch.sequence, batch.pixel_values).loss_sum
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with as_peft_adds(model):
        expected = gradients()
    if how == "compiled":
        compile_layers(model)
    found = gradients()
    assert found.keys() == expected.keys() and len(found) == 2 * 4 * 7 + 4
    for name, gradient in expected.items():
        off = (found[name] - gradient).norm() / gradient.norm()
        assert off < (0.1 if autocast else 1e-4), name
