"""Training steps and answers on the device: beside Hugging Face, in bf16, in 4 bits, and what the host waits for."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from model.test_quantize import check_four_bits
from model.test_synchronisations import batch, stages
from tiny import labels_of, packed, tiny_inputs, tiny_llava

from mmprune_train.config.schema import OptimConfig, StageConfig
from mmprune_train.doctor.self_test import check_near, losses_of_steps
from mmprune_train.model import loss
from mmprune_train.model.kernels import BACKENDS, Needs
from mmprune_train.model.quantize import check_quantization
from mmprune_train.training.freezing import freeze
from mmprune_train.training.optim import adamw, parameter_groups
from mmprune_train.training.precision import Precision, choose_precision

pytestmark = pytest.mark.cuda
FP32 = Precision(torch.float32, "")


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return losses_of_steps(torch.device("cpu"), FP32)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_steps_with_every_attention_kernel_lose_what_the_processor_loses(
    name: str, dtype: torch.dtype, device: torch.device, reference: list[float]
) -> None:
    """Two-stage pruning, LoRA, from image files to the optimizer; heads of 16."""
    kernel = next(backend for backend in BACKENDS if backend.name == name)
    if reason := kernel.missing(Needs(device, dtype, 16)):
        pytest.skip(f"{name}: {reason}")
    check_near(losses_of_steps(device, Precision(dtype, ""), name)[0], reference)


def test_auto_computes_in_bf16_on_a_gpu_of_today(device: torch.device) -> None:
    chosen = choose_precision("auto", device.type)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        assert chosen.name == "bf16", chosen.reason


@pytest.mark.parametrize("pruner", ["none", "uniform"])
def test_gradients_under_autocast_point_where_those_in_fp32_do(pruner: str, device: torch.device) -> None:
    """Neither pruner's choice depends on rounding."""
    model, given = packed(tiny_llava(), pruner).to(device).train(), batch().to(device)
    found = []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = model.forward_packed(given.sequence, given.pixel_values)
        output.loss_sum.backward()
        gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        found.append((float(output.loss_sum.detach()), torch.cat(gradients)))
    (exact, exactly), (rounded, roughly) = found
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(exactly, roughly, dim=0) > 0.99


def test_logits_gradients_and_answers_are_hugging_faces(device: torch.device) -> None:
    hf = tiny_llava().to(device)
    model = packed(hf).train()
    inputs = {k: v.to(device) for k, v in tiny_inputs([2, 0, 1], [7, 9, 1], pad_left=True).items()}
    labels = labels_of(inputs)
    reference, ours = hf(**inputs, labels=labels), model(**inputs, labels=labels)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], reference.logits[real], rtol=1e-4, atol=1e-4)
    reference.loss.backward()
    ours.loss.backward()
    for (name, mine), (_, theirs) in zip(model.hf.named_parameters(), hf.named_parameters(), strict=True):
        if theirs.grad is not None and mine.grad is not None:
            largest = max(1.0, float(theirs.grad.abs().max()))
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)
    expected = hf.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.eval().generate(**inputs, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["as_trained", "fused"])
def test_adamw_moves_weights_as_it_does_on_the_processor(fused: bool, device: torch.device) -> None:
    """The fused kernel is not used: Lightning does not clip gradients with it. Held to the same, so that it may be."""
    models = [packed(tiny_llava()), packed(tiny_llava()).to(device)]
    for model, kind in zip(models, (torch.optim.AdamW, partial(torch.optim.AdamW, fused=fused)), strict=True):
        parts = freeze(model, StageConfig(train_projector=True, train_llm=True, lr=1e-3), adapters=False)
        optimizer = adamw(parameter_groups(model, parts, 0.1), OptimConfig(), kind)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            optimizer.step()
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)


def test_four_bits_train_and_merge_on_the_device(device: torch.device) -> None:
    pytest.importorskip("bitsandbytes")
    if device.type == "cuda":
        check_quantization("cuda")
    check_four_bits(device)


@pytest.mark.parametrize("name", ["none", "twostage", "pyramiddrop"])
def test_the_host_waits_once_for_each_pruning_stage(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the count on a pretended device says. Liger's kernel waits, too, so the loss is taken in chunks."""
    if device.type != "cuda":
        pytest.skip("CUDA itself counts")
    monkeypatch.setattr(loss, "loss_kernel", lambda _: ("chunked", ""))
    model = packed(tiny_llava(), name).to(device).train()
    given = copy.deepcopy(batch()).to(device)
    for counted in (False, True):  # what is made once, is made the first time
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if counted else "default")
            try:
                model.forward_packed(given.sequence, given.pixel_values).loss_sum.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in told if "synchronizing CUDA" in str(one.message)]
    assert len(waits) == stages(model), waits
