"""What a stage trains, stated part by part: nothing is guessed from names of folders or left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mmprune_train.config.schema import StageConfig
from mmprune_train.model.flops import size_of
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.vision import deepest_feature, family_of
from mmprune_train.reporting.tables import table

ADAPTER_MARK = "lora_"
"""Part of the name of every parameter that PEFT's LoRA and DoRA add."""


@dataclass(frozen=True)
class Part:
    """One part of the network in one stage."""

    name: str
    """`vision`, `projector`, `llm` or `llm adapters`; `text tower` where stage 1 reads the question, `scorer` where its
    score has weights."""
    parameters: int
    trainable: int
    lr: float | None
    """Peak learning rate; None: frozen."""


def parts_of(model: PackedLlava) -> dict[str, nn.ModuleList]:
    """The modules behind each part's name; a parameter that two modules share (tied embeddings) is one parameter."""
    inner = model.hf.model
    modules = {
        "vision": [inner.vision_tower],
        **({"scorer": [model.scorer]} if model.scorer is not None else {}),
        "projector": [inner.multi_modal_projector],
        "llm": [inner.language_model, model.hf.lm_head],
        **({"text tower": [model.question]} if model.question is not None else {}),
    }
    return {name: nn.ModuleList(held) for name, held in modules.items()}


def freeze(model: PackedLlava, stage: StageConfig, adapters: bool) -> list[Part]:
    """Set `requires_grad` of every parameter and the train/eval mode of every part.

    Args:
        model: its `hf` holds the parts.
        stage: what to train and how fast.
        adapters: the LLM carries PEFT adapters, and they alone are its trainable weights.
    """
    model.requires_grad_(False)
    model.train()
    settings = {
        "vision": (stage.train_vision, stage.vision_lr),
        "projector": (stage.train_projector, stage.projector_lr),
        "llm": (stage.train_llm, None),
        "text tower": (False, None),
        "scorer": (stage.train_scorer, stage.scorer_lr),
    }
    report = []
    for part, modules in parts_of(model).items():
        wanted, rate = settings[part]
        only_adapters = adapters and part == "llm"
        if wanted:
            for name, parameter in modules.named_parameters():
                parameter.requires_grad_(not only_adapters or ADAPTER_MARK in name)
        if part == "projector" and model.hf.config.projector_hidden_act == "linear":
            modules[0].linear_2.requires_grad_(False)  # the identity that makes a linear projector of two layers
        if part == "vision":
            for parameter in _never_run(modules[0], model):
                parameter.requires_grad_(False)
        if part in ("vision", "text tower", "scorer") and not wanted:
            modules[0].eval()
        trainable = sum(size_of(p) for p in modules.parameters() if p.requires_grad)
        report.append(
            Part(
                f"{part} adapters" if only_adapters else part,
                sum(size_of(p) for p in modules.parameters()),
                trainable,
                (stage.lr if rate is None else rate) if trainable else None,
            )
        )
    return report


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weights in the dtype they are computed in: half the memory, no cast at each use."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def freezing_table(parts: list[Part], title: str) -> str:
    rows = [[p.name, p.parameters, p.trainable, p.lr] for p in parts]
    rows.append(["total", sum(p.parameters for p in parts), sum(p.trainable for p in parts), None])
    return table(rows, ["part", "parameters", "trainable", "lr"], title)


def _never_run(tower: nn.Module, model: PackedLlava) -> Iterator[nn.Parameter]:
    """The tower's parameters after the feature layer: they get no gradient, which data parallelism cannot take."""
    layers = family_of(model.hf.model.vision_tower.config.model_type).layers(tower)
    deepest = deepest_feature(model.hf.config.vision_feature_layer, len(layers))
    used = {id(p) for layer in layers[:deepest] for p in layer.parameters()}
    for name, parameter in tower.named_parameters():
        embeds = ("embeddings" in name or "pre_layrnorm" in name) and "mask_token" not in name
        if not embeds and id(parameter) not in used:
            yield parameter
