"""Cross-entropy at supervised positions, without ever holding the logits of more than a chunk of them.

torch has `linear_cross_entropy` from 2.13 on. It is not used: it returns the sum in the dtype of the states, so in bf16
with three digits, and torch's FLOP counter does not see into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmprune_train.model.kernels import installed
from mmprune_train.model.rows import computed_in, rounded_up

CHUNK = 1024
"""Positions whose logits exist at a time: 200 MB in fp32 for a vocabulary of 50,000."""

LIGER = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")


def cross_entropy_sum(head: nn.Linear, states: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum of the cross-entropies of `head`'s logits, scalar in fp32 (fp64 for states in fp64).

    Without positions it is 0, and its backward pass reaches states and head all the same. The head is called as a
    module, once whatever the number of chunks, so that ZeRO-3 gathers its weight, on every rank as often.

    Args:
        head: a Linear without bias, as every supported LLM has.
        states: [S, D] at supervised positions.
        targets: [S] token ids.
        chunk: positions at a time.
    """
    assert [name for name, _ in head.named_parameters()] == ["weight"], "the head is not a plain matrix"

    def loss(states: Tensor) -> Tensor:
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()  # else its gradient is computed
        if len(states) and loss_kernel(states.device)[0] == "liger":
            return installed(*LIGER)[0](states, weight, targets, reduction="sum")
        return _ChunkedCrossEntropy.apply(states, weight, targets, chunk)

    with _computing(head, loss):
        return head(states)


def loss_kernel(device: torch.device) -> tuple[str, str]:
    """`liger` or `chunked`, and why."""
    if device.type != "cuda":
        return "chunked", "on a CPU"
    missing = installed(*LIGER)[1]
    return ("chunked", missing) if missing else ("liger", "liger_kernel is installed")


@contextmanager
def _computing(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let calls of `module`, with all its hooks, compute something else of its weights."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, its gradients: the logits are neither kept nor computed twice.

    The gradient of a position's logits is softmax - one_hot, known as soon as they are; the backward pass only scales.
    A trained weight's gradient is summed over the chunks in fp32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        dtype = computed_in(states.device, states.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        matrix = weight.to(dtype)
        state_gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=states.device)
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            some, target = rounded_up(states[part].to(dtype)), targets[part, None]
            logits = (some @ matrix.T)[: len(target)].to(wide)  # [chunk, V], from here on in place
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, target)
            mass = logits.exp_().sum(1, keepdim=True)
            total += (mass.log() - right).sum()
            if state_gradient is None and weight_gradient is None:
                continue
            slope = rounded_up(logits.div_(mass).scatter_(1, target, right.exp() / mass - 1).to(dtype))
            if state_gradient is not None:
                state_gradient[part] = (slope @ matrix)[: len(target)]
            if weight_gradient is not None:
                weight_gradient += slope.T @ some
        ctx.save_for_backward(state_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward pass over this graph is refused by autograd's own check.
        return *(None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors), None, None
