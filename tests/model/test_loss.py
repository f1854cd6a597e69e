"""The chunked loss against torch's cross-entropy over all logits at once, and what it holds in memory."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from tiny import labels_of, packed, tiny_inputs, tiny_llava
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmprune_train.model import kernels, loss
from mmprune_train.model.loss import cross_entropy_sum, loss_kernel

WIDTH, VOCAB = 24, 97


def drawn(rows: int, trained: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=dtype).requires_grad_(trained)
    states = (3 * torch.randn(rows, WIDTH, dtype=dtype)).requires_grad_()
    return head, states, torch.randint(0, VOCAB, (rows,))


def plain(head: nn.Linear, states: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, and gradients of `scale` times it, of states and weight, in float64."""
    wide = states.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    total = cross_entropy(linear(wide, weight), targets, reduction="sum")
    return total, *torch.autograd.grad(total * scale, (wide, weight))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_loss_and_gradients_equal_one_cross_entropy_over_all_logits(trained: bool, chunk: int) -> None:
    head, states, targets = drawn(100, trained)
    total = cross_entropy_sum(head, states, targets, chunk)
    (total * 0.3).backward()
    expected, state_gradient, weight_gradient = plain(head, states, targets, 0.3)
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(states.grad.double(), state_gradient, rtol=1e-5, atol=1e-6)
    if trained:
        torch.testing.assert_close(head.weight.grad.double(), weight_gradient, rtol=1e-5, atol=1e-5)
    else:
        assert head.weight.grad is None


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_in_half_precision_the_sum_is_taken_in_fp32(trained: bool) -> None:
    """300 losses of about 10 each: bf16 would round their sum to a multiple of 16."""
    head, states, targets = drawn(300, trained)
    with torch.autocast("cpu", torch.bfloat16):
        total = cross_entropy_sum(head, states, targets, 64)
        whole = linear(states, head.weight)
    assert whole.dtype == torch.bfloat16 and total.dtype == torch.float32
    total.backward()
    expected = cross_entropy(whole.detach().float(), targets, reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    _, state_gradient, weight_gradient = plain(head, states, targets, 1.0)
    assert states.grad.dtype == torch.float32
    torch.testing.assert_close(states.grad.double(), state_gradient, rtol=0.05, atol=0.02)
    if trained:
        assert head.weight.grad.dtype == torch.float32
        torch.testing.assert_close(head.weight.grad.double(), weight_gradient, rtol=0.05, atol=0.2)


def test_extreme_logits_neither_overflow_nor_lose_the_loss() -> None:
    head, states, targets = drawn(6, True)
    with torch.no_grad():
        states *= 200
    total = cross_entropy_sum(head, states, targets, 4)
    total.backward()
    expected, state_gradient, _ = plain(head, states, targets, 1.0)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(states.grad.double(), state_gradient, rtol=1e-4, atol=1e-4)


def test_without_supervised_positions_the_loss_is_zero_and_still_reaches_the_head() -> None:
    head, states, targets = drawn(4, True)
    total = cross_entropy_sum(head, states[:0], targets[:0], 3)
    assert total.item() == 0
    total.backward()
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight)) and torch.equal(
        states.grad, torch.zeros(4, WIDTH)
    )


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_the_head_is_called_once_as_a_module_whatever_the_number_of_chunks(rows: int) -> None:
    """ZeRO-3 gathers a weight in hooks around its module, on all ranks together: as often on each."""
    head, states, targets = drawn(rows, True)
    events = []
    head.register_forward_pre_hook(lambda *_: events.append("forward"))
    head.register_full_backward_hook(lambda *_: events.append("backward"))
    cross_entropy_sum(head, states, targets, 8).backward()
    assert events == ["forward", "backward"]
    assert "forward" not in vars(head)
    torch.testing.assert_close(head(states), linear(states, head.weight))


def test_an_error_inside_leaves_the_head_as_it_was() -> None:
    head, states, _ = drawn(3, True)
    with pytest.raises((RuntimeError, IndexError)):
        cross_entropy_sum(head, states, torch.tensor([0, 1, VOCAB]), 8)
    assert "forward" not in vars(head)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside holds, of those as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor) and made.dim() == 2 and made.shape[1] == VOCAB:
                self.rows = max(self.rows, len(made))
        return out


def test_no_more_than_a_chunk_of_logits_ever_exists() -> None:
    head, states, targets = drawn(1000, True)
    with Largest() as seen:
        cross_entropy_sum(head, states, targets, 16).backward()
    assert seen.rows == WIDTH or seen.rows == 16  # the transposed weight is [WIDTH, VOCAB]


@pytest.mark.parametrize(("trained", "passes"), [(True, 3), (False, 2)], ids=["trained", "frozen"])
def test_logits_are_computed_once(trained: bool, passes: int) -> None:
    head, states, targets = drawn(50, trained)
    with FlopCounterMode(display=False) as counter:
        cross_entropy_sum(head, states, targets, 16).backward()
    assert counter.get_total_flops() == passes * 2 * 50 * WIDTH * VOCAB


def test_without_gradients_none_is_computed() -> None:
    head, states, targets = drawn(50, True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        total = cross_entropy_sum(head, states.detach(), targets, 16)
    assert counter.get_total_flops() == 2 * 50 * WIDTH * VOCAB and not total.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    head, states, targets = drawn(5, True)
    total = cross_entropy_sum(head, states, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("chunk", [1, 5])
def test_the_models_loss_does_not_depend_on_the_chunk(chunk: int) -> None:
    hf = tiny_llava()
    inputs = tiny_inputs([1, 2], [8, 6])
    labels = labels_of(inputs)
    reference = hf(**inputs, labels=labels)
    reference.loss.backward()
    model = packed(hf, logits_chunk=chunk).train()
    model.zero_grad()
    ours = model(**inputs, labels=labels)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.hf.lm_head.weight.grad, hf.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- Liger


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """A stand-in with the signature of Liger's function, that computes the same."""
    calls = []

    def liger_fused_linear_cross_entropy(
        input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    ):  # fmt: skip
        assert len(input), "Liger divides by the number of rows"
        calls.append((input.shape, weight.shape, reduction))
        return cross_entropy(linear(input, weight), target, reduction=reduction)

    module, name = loss.LIGER
    fake = types.ModuleType(module)
    setattr(fake, name, liger_fused_linear_cross_entropy)
    monkeypatch.setitem(sys.modules, module, fake)
    kernels.installed.cache_clear()
    yield calls
    kernels.installed.cache_clear()


def test_liger_takes_the_loss_on_cuda_where_it_is_installed(
    liger: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loss_kernel(torch.device("cuda"))[0] == "liger"
    assert loss_kernel(torch.device("cpu")) == ("chunked", "on a CPU")
    monkeypatch.setattr(loss, "loss_kernel", lambda device: ("liger", ""))
    head, states, targets = drawn(9, True)
    total = cross_entropy_sum(head, states, targets)
    assert liger == [((9, WIDTH), (VOCAB, WIDTH), "sum")]
    assert total.item() == pytest.approx(float(plain(head, states, targets, 1.0)[0]), rel=1e-6)
    assert cross_entropy_sum(head, states[:0], targets[:0]).item() == 0 and len(liger) == 1


def test_without_liger_the_reason_is_told() -> None:
    kernels.installed.cache_clear()
    kernel, reason = loss_kernel(torch.device("cuda"))
    if kernel == "liger":
        pytest.skip("Liger is installed")
    assert kernel == "chunked" and "liger_kernel" in reason
