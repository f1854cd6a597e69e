"""A plan in words: one page, a verdict for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmprune_train.devices import GIB, Device
from mmprune_train.planning.plan import Cost, StagePlan
from mmprune_train.reporting.tables import table
from mmprune_train.training.freezing import freezing_table

QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
MEMORY = {
    "weights": "memory: weights",
    "gradients": "  gradients",
    "optimizer": "  optimizer",
    "activations": "  activations",
    "logits": "    logits in it",
    "strategy": "  of the strategy",
    "overhead": "  overhead, assumed",
    "total": "  total a device",
}
"""Rows of the table: what `Memory` calls them, and how they are told."""


def gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:,.1f} GiB" if value >= GIB / 10 else f"{value / 2**20:,.1f} MiB"


def flops(value: float) -> str:
    sizes = {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
    unit = next((unit for unit, size in sizes.items() if value >= size), "MFLOP")
    return f"{value / sizes[unit]:,.2f} {unit}" if value else "-"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:,.3g} s"


def fits(cost: Cost, device: Device) -> bool:
    return cost.memory.total <= device.memory_bytes


def verdict(cost: Cost, device: Device, remedy: Sequence[str] | None) -> str:
    """`fits: ...` or `does not fit: ...; fits with ...`."""
    said = f"{gib(cost.memory.total)} of {gib(device.memory_bytes)}"
    if fits(cost, device):
        return f"fits: {said}"
    if not remedy:
        return f"does not fit: {said}; nor with checkpointing, smaller batches, ZeRO-3, adapters or offloading"
    rates = " (adapters want learning rates of their own)" if any(key.startswith("peft=") for key in remedy) else ""
    return f"does not fit: {said}; fits with {' '.join(remedy)}{rates}"


def longest(cost: Cost) -> str:
    """The micro-batch that decides the memory."""
    images = f"{cost.longest_images} images" if cost.longest_images else "text alone, of which nothing is pruned"
    return f"longest batch: {cost.longest:,.0f} tokens a layer, {images}"


def distribution(values: Tensor) -> dict[str, float]:
    found = {name: float(torch.quantile(values, share)) for name, share in QUANTILES.items()}
    return {**found, "mean": float(values.mean())}


def of_stage(plan: StagePlan, device: Device, mfu: float) -> dict[str, Any]:
    """A stage for result.json; bytes, FLOPs and seconds."""

    def of(cost: Cost) -> dict[str, Any]:
        seconds = cost.seconds(device, mfu, plan.world)
        return {
            "tokens": {name: distribution(getattr(cost.tokens, name)) for name in ("dense", "stage1", "layer_mean")},
            "keep_ratio": cost.tokens.keep_ratio,
            "visual_keep_ratio": cost.tokens.visual_keep_ratio,
            "flops_per_step": cost.flops.__dict__,
            "memory_per_device": {**cost.memory.__dict__, "total": cost.memory.total},
            "longest_batch": {"tokens": cost.longest, "images": cost.longest_images},
            "fits": fits(cost, device),
            "step_seconds": seconds,
            "hours": None if seconds is None or plan.steps is None else seconds * plan.steps / 3600,
        }

    return {
        "parts": [part.__dict__ for part in plan.parts],
        "strategy": plan.strategy,
        "devices": plan.world,
        "accumulation": plan.micro_batches,
        "steps": plan.steps,
        "dense": of(plan.dense),
        "pruned": None if plan.pruned is None else of(plan.pruned),
        "disk": plan.disk.__dict__,
    }


def stage_text(plan: StagePlan, device: Device, mfu: float, source: str, kept: str) -> str:
    """The tables of a stage. `source`: where lengths come from; `kept`: where pruned counts come from."""
    steps = "steps unknown" if plan.steps is None else f"{plan.steps:,} steps"
    lines = [freezing_table(plan.parts, f"Stage {plan.name}: {steps}, {plan.strategy} on {plan.world} device(s)")]
    counts = {"dense": plan.dense.tokens.dense}
    if plan.pruned is not None:
        counts |= {"after stage 1": plan.pruned.tokens.stage1, "mean over layers": plan.pruned.tokens.layer_mean}
    found = {name: distribution(values) for name, values in counts.items()}
    names = list(found["dense"])
    rows = [[name, *map(round, values.values())] for name, values in found.items()]
    lines.append(table(rows, ["tokens a sample", *names], f"Tokens: {source}"))
    if plan.pruned is not None:
        lines[-1] += f"\nkept: {kept}; keep_ratio {plan.pruned.tokens.keep_ratio:.3f}"
    costs = [plan.dense] if plan.pruned is None else [plan.dense, plan.pruned]
    header = ["per step" if plan.pruned is None else "", "dense", "pruned", "pruned / dense"][: 2 * len(costs)]
    lines.append(table(_rows(plan, costs, device, mfu), header))
    cache = "" if plan.disk.cache is None else f", feature cache {gib(plan.disk.cache)}"
    lines.append(f"disk: checkpoints {gib(plan.disk.checkpoints)}, model/ {gib(plan.disk.model)}{cache}")
    return "\n\n".join(lines)


def _rows(plan: StagePlan, costs: list[Cost], device: Device, mfu: float) -> list[list[object]]:
    def row(name: str, values: list[float | None], show: Any) -> list[object]:
        cells: list[object] = [name, *(show(value) for value in values)]
        if len(values) > 1:
            first, second = values
            cells.append(f"{second / first:.3f}" if first and second is not None else "-")
        return cells

    seconds = [cost.seconds(device, mfu, plan.world) for cost in costs]
    hours = [None if s is None or plan.steps is None else s * plan.steps for s in seconds]
    return [
        row("FLOPs of a step", [cost.flops.total for cost in costs], flops),
        row("  and recomputed", [cost.flops.recomputed for cost in costs], flops),
        row("a step", seconds, duration),
        row("the stage", hours, duration),
        *(row(told, [getattr(cost.memory, name) for cost in costs], gib) for name, told in MEMORY.items()),
        *([row("on the host, a device", [c.memory.host for c in costs], gib)] if costs[0].memory.host else []),
    ]
