"""Packed models whose LLM has adapters."""

from __future__ import annotations

import copy

import torch

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import PeftConfig, StageConfig
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters
from mmprune_train.pruning import Pruner
from mmprune_train.training.freezing import freeze


def adapted(hf: torch.nn.Module, name: str = "lora", r: int = 4) -> PackedLlava:
    """A packed copy of a model whose adapters and projector are trained: not what they start as."""
    model = PackedLlava(copy.deepcopy(hf), Pruner(load_pruner("none"))).eval()
    add_adapters(model, PeftConfig(name=name, r=r, alpha=2 * r, dropout=0.0))
    freeze(model, StageConfig(train_projector=True, train_llm=True, use_peft=True), adapters=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()
