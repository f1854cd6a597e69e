"""AdamW with one learning rate a part, no decay on norms and biases, and a schedule over a known number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmprune_train.config.schema import OptimConfig
from mmprune_train.model.llava import PackedLlava
from mmprune_train.training.freezing import Part, parts_of

NO_DECAY = " (no decay)"


def parameter_groups(model: PackedLlava, parts: list[Part], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters by part and by whether weight decay applies (matrices only).

    A group's `name` is the part's, with `NO_DECAY` for norms and biases.
    """
    groups = []
    for part, modules in zip(parts, parts_of(model).values(), strict=True):
        trained = [p for p in modules.parameters() if p.requires_grad]
        for name, chosen, decay in (
            (part.name, [p for p in trained if _dims(p) >= 2], weight_decay),
            (part.name + NO_DECAY, [p for p in trained if _dims(p) < 2], 0.0),
        ):
            if chosen:
                groups.append({"name": name, "params": chosen, "lr": part.lr, "weight_decay": decay})
    return groups


def _dims(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 flattens what it shards


def adamw(
    groups: list[dict[str, Any]], optim: OptimConfig, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> torch.optim.Optimizer:
    """AdamW over these groups; `kind`: an implementation with torch's arguments."""
    beta1, beta2 = optim.betas
    return kind(groups, betas=(beta1, beta2), eps=optim.eps)


def schedule(name: str, total_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Factor of the peak learning rate at each optimizer step, 0-based, as transformers' schedules give it.

    Linear warm-up over `ceil(warmup_ratio * total_steps)` steps, then `cosine` or `linear` to zero, or `constant`.
    """
    warmup = math.ceil(warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0 - progress if name == "linear" else 1.0

    return factor
