"""Attention and loss kernels on the device against plain sums in float64."""

from __future__ import annotations

import pytest
import torch
from model.test_attention import BY_NAME, HEADS, LENGTHS, check
from model.test_loss import plain
from torch import nn

from mmprune_train.model import loss
from mmprune_train.model.kernels import Needs, choose_backend
from mmprune_train.model.loss import cross_entropy_sum, loss_kernel

pytestmark = pytest.mark.cuda


SHAPES = {"llava": (128, HEADS["one_for_each"]), "grouped": (64, HEADS["grouped"])}
"""Features of a head, and heads; few, since FlexAttention is compiled for each."""


@pytest.mark.parametrize(("size", "heads"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_attention_kernel_equals_plain_attention(
    name: str, dtype: torch.dtype, size: int, heads: tuple[int, int], device: torch.device
) -> None:
    if reason := BY_NAME[name].missing(Needs(device, dtype, size)):
        pytest.skip(f"{name}: {reason}")
    for lengths in LENGTHS.values():
        check(BY_NAME[name], heads, lengths, dtype, device, train=True, size=size)


def test_a_fast_kernel_is_chosen_for_llavas_heads(device: torch.device) -> None:
    backend, reason = choose_backend("auto", device, torch.bfloat16, 128)
    assert backend.name != "sdpa_per_sample", reason


MIXED = {"fp32": (False, torch.float32), "trained": (True, torch.float32), "frozen": (True, torch.bfloat16)}
"""Whether under autocast to bf16, and the dtype that the head is kept in."""


@pytest.mark.parametrize(("autocast", "dtype"), MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("kernel", ["liger", "chunked"])
def test_both_loss_kernels_equal_one_cross_entropy(
    kernel: str, autocast: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, reason = loss_kernel(device)
    if kernel == "liger" != there:
        pytest.skip(f"liger: {reason}")
    monkeypatch.setattr(loss, "loss_kernel", lambda _: (kernel, ""))
    trained = dtype == torch.float32
    head = nn.Linear(256, 4099, bias=False, device=device, dtype=dtype).requires_grad_(trained)
    states = (3 * torch.randn(700, 256, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, 4099, (700,), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        total = cross_entropy_sum(head, states, targets, chunk=256)
    (total * 0.3).backward()
    expected, *gradients = plain(head, states, targets, 0.3)
    near = 0.02 if autocast else 1e-5
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=near)
    assert (head.weight.grad is not None) == trained
    for found, wanted in zip((states.grad, head.weight.grad), gradients, strict=True):
        if found is not None:
            largest = float(wanted.abs().max())
            torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near * largest)
