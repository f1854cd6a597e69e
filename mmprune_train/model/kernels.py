"""Attention kernels over a packed sequence, and which of them runs here, by device, dtype, heads and what is installed.

Each computes causal attention inside every sample of a packed sequence and nothing else. A kernel that cannot run says
what it lacks; `choose_backend` takes the first of `BACKENDS` that lacks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from mmprune_train.errors import UserError

BLOCK = 128
"""Tokens along either side of a block of FlexAttention's mask: the size its kernels expect."""
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Borders:
    """Borders of the samples of a packed sequence, on the device and on the host, and what attends inside them."""

    cu_seqlens: Tensor
    """[B + 1] int32."""
    lengths: list[int]
    backend: Backend

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask, made once for all layers that share these borders.

        Blocks are listed from the borders alone, without the [T, T] mask that `create_block_mask` would go through.
        """
        length = sum(self.lengths)
        lengths = self.cu_seqlens.diff()
        samples = torch.arange(len(lengths), device=lengths.device)
        segment = samples.repeat_interleave(lengths, output_size=length)  # [T]
        block = torch.arange(-(-length // BLOCK), device=segment.device)
        first, last = segment[block * BLOCK], segment[(block * BLOCK + BLOCK - 1).clamp(max=length - 1)]
        queries, keys = block[:, None], block[None]
        seen = (keys <= queries) & (last[None] >= first[:, None])  # [blocks, blocks]
        whole = (keys < queries) & (first[None] == last[:, None]) & (queries < length // BLOCK)

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (segment[query] == segment[key])

        return BlockMask.from_kv_blocks(
            *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
        )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, K] bool -> how many of each row are true [1, 1, Q], and the columns, true ones first [1, 1, Q, K]; int32."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@dataclass(frozen=True)
class Needs:
    """What a kernel has to cope with."""

    device: torch.device
    dtype: torch.dtype
    """Of the queries as they are attended with, under autocast that of autocast."""
    head_dim: int
    dropout: float = 0.0

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.device)


Run = Callable[[Tensor, Tensor, Tensor, Borders, float, float], Tensor]
"""query [1, H, T, d], key and value [1, Hkv, T, d] with Hkv dividing H, borders, scale, dropout -> [1, T, H, d]."""


@dataclass(frozen=True)
class Backend:
    name: str
    missing: Callable[[Needs], str | None]
    """Why it cannot run, or None."""
    run: Run


def choose_backend(
    setting: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float = 0.0
) -> tuple[Backend, str]:
    """The kernel that `trainer.attention` asks for (UserError where it cannot run here), or the fastest that can, and
    why it is this one."""
    needs = Needs(device, dtype, head_dim, dropout)
    if setting != "auto":
        chosen = next(backend for backend in BACKENDS if backend.name == setting)
        if reason := chosen.missing(needs):
            raise UserError(f"trainer.attention={setting}: {reason}; set trainer.attention=auto for what can run here")
        return chosen, "as trainer.attention asks"
    passed_over: list[str] = []
    for backend in BACKENDS:
        if (reason := backend.missing(needs)) is None:
            return backend, "on a CPU" if device.type == "cpu" else "; ".join(passed_over) or "the fastest there is"
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("sdpa_per_sample runs anywhere")


@cache
def installed(module: str, name: str) -> tuple[Any, str | None]:
    """A function of a package that may not be there, or why it is not. Imported for real: the package of FlashAttention
    2 holds version 4's files without what they need, and a build for another torch fails only when it is imported."""
    try:
        return getattr(import_module(module), name), None
    except Exception as error:  # a build for another torch or CUDA fails in many ways
        lines = str(error).splitlines()
        return None, f"{module} cannot be imported ({lines[0] if lines else type(error).__name__})"


def _flash(name: str, module: str, majors: range, widest: int, drops: bool) -> Backend:
    def missing(needs: Needs) -> str | None:
        reason = _half_on_gpu(needs, majors, widest) or (None if drops else _without_dropout(needs))
        return reason or installed(module, "flash_attn_varlen_func")[1]

    def run(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, dropout: float) -> Tensor:
        attend, reason = installed(module, "flash_attn_varlen_func")
        assert reason is None, reason
        out = attend(  # by name: the order differs between the versions, and between the releases of version 4
            *_packed(query, key, value),
            **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), borders.cu_seqlens),
            **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max(borders.lengths)),
            softmax_scale=scale,
            causal=True,
            **({"dropout_p": dropout} if drops else {}),
        )
        return (out[0] if isinstance(out, tuple) else out)[None]  # version 4, and old releases of 3, add the logsumexp

    return Backend(name, missing, run)


def _packed(*tensors: Tensor) -> list[Tensor]:
    """[1, H, T, d] each -> [T, H, d]."""
    return [tensor[0].transpose(0, 1) for tensor in tensors]


def _varlen_missing(needs: Needs) -> str | None:
    if reason := _half_on_gpu(needs, range(8, 99), 256) or _without_dropout(needs):
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without FlashAttention"
    attend, reason = installed("torch.nn.attention.varlen", "varlen_attn")
    if reason is None and not {"scale", "window_size", "enable_gqa"} <= set(signature(attend).parameters):
        return "this torch's varlen_attn takes neither scale nor grouped heads"
    return reason


def _varlen(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, dropout: float) -> Tensor:
    attend, reason = installed("torch.nn.attention.varlen", "varlen_attn")
    assert reason is None, reason
    cu, longest = borders.cu_seqlens, max(borders.lengths)
    grouped = query.shape[1] != key.shape[1]
    q, k, v = _packed(query, key, value)
    return attend(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped)[None]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)  # one kernel for batches of any length


def _flex_missing(needs: Needs) -> str | None:
    if needs.device.type != "cuda":
        return "FlexAttention has no backward pass here: it needs a CUDA device"
    if needs.capability < (7, 0):
        return _too_old(needs, "7.0 or newer")
    if needs.head_dim < 16:
        return f"needs heads of at least 16 features, not {needs.head_dim}"
    return _without_dropout(needs) or installed("triton", "__version__")[1]


def _flex(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, dropout: float) -> Tensor:
    attend: Any = _compiled_flex() if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=borders.block_mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _cpu_flash_missing(needs: Needs) -> str | None:
    if needs.device.type != "cpu":
        return "is for CPUs"
    if needs.dtype not in HALF:
        return "is for bf16 and fp16; in fp32 it would be sdpa_per_sample (trainer.precision=bf16)"
    return _without_dropout(needs)


def _cpu_flash(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, dropout: float) -> Tensor:
    return _CpuFlash.apply(query, key, value, borders.lengths, scale)


class _CpuFlash(torch.autograd.Function):
    """SDPA's own CPU kernel, whose backward pass runs in fp32: in half precision it takes two to four times as long
    (torch 2.13, samples of 80 to 350 tokens) and is less exact. One node for all samples."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        outs, logsumexp = zip(*(attend(*part, 0.0, True, scale=scale) for part in parts), strict=True)
        out = torch.cat([part.transpose(1, 2) for part in outs], dim=1)
        ctx.save_for_backward(query, key, value, out, *logsumexp)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *logsumexp = ctx.saved_tensors
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        every = (gradient.transpose(1, 2), query, key, value, out.transpose(1, 2))
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        samples = zip(*(x.split(ctx.lengths, dim=2) for x in (*every, *gradients)), logsumexp, strict=True)
        for *given, into_query, into_key, into_value, sums in samples:  # in fp32 as long as they are in the cache
            found = differentiate(*(x.float() for x in given), sums, 0.0, True, scale=ctx.scale)
            for into, part in zip((into_query, into_key, into_value), found, strict=True):
                into.copy_(part)
        return *gradients, None, None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, dropout: float) -> Tensor:
    parts = zip(*(x.split(borders.lengths, dim=2) for x in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outs = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, is_causal=True, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)  # as the CPU's kernel lays them out: one copy less


def _half_on_gpu(needs: Needs, majors: range, widest: int) -> str | None:
    if needs.device.type != "cuda":
        return "needs a CUDA device"
    if needs.dtype not in HALF:
        return f"needs bf16 or fp16, not {str(needs.dtype).removeprefix('torch.')} (trainer.precision=bf16)"
    if needs.capability[0] not in majors:
        return _too_old(needs, f"{majors[0]}.0 " + ("or newer" if majors[-1] > 90 else f"to {majors[-1]}.x"))
    if needs.head_dim % 8 or needs.head_dim > widest:
        return f"needs heads of a multiple of 8 features, at most {widest}, not {needs.head_dim}"
    return None


def _too_old(needs: Needs, wanted: str) -> str:
    major, minor = needs.capability
    return f"needs a GPU of compute capability {wanted}, this one has {major}.{minor}"


def _without_dropout(needs: Needs) -> str | None:
    return f"has no attention dropout ({needs.dropout} in the LLM's config)" if needs.dropout else None


BACKENDS = (
    # Early releases of version 4 refuse the backward pass over packed sequences on 9.x, which version 3 is made for.
    _flash("flash_4", "flash_attn.cute", range(10, 12), widest=128, drops=False),
    _flash("flash_3", "flash_attn_interface", range(9, 10), widest=256, drops=False),
    _flash("flash_2", "flash_attn", range(8, 99), widest=256, drops=True),
    Backend("torch_varlen", _varlen_missing, _varlen),
    Backend("flex", _flex_missing, _flex),
    Backend("cpu_flash", _cpu_flash_missing, _cpu_flash),
    Backend("sdpa_per_sample", lambda needs: None, _sdpa),
)
"""Fastest first."""
