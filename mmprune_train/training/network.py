"""The network as a training stage trains it: what it starts from, frozen and adapted, and its projector fitted."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.attention import backend_for
from mmprune_train.model.begin import begin
from mmprune_train.model.language import checkpoint_layers, compile_layers
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.loss import loss_kernel
from mmprune_train.model.peft import add_adapters
from mmprune_train.model.projector import match_features
from mmprune_train.model.vision import check_patches
from mmprune_train.model.weights.adapters import load_adapters
from mmprune_train.model.weights.start import Start
from mmprune_train.quiet import quiet
from mmprune_train.training.divergence import broken_tensors
from mmprune_train.training.freezing import Part, freeze, store_frozen
from mmprune_train.training.inputs import template_of
from mmprune_train.training.precision import Precision

MATCHED_IMAGES = 64
"""Images that `projector.init=matched` measures features on."""


def load_stage(
    config: Config, name: str, start_from: Start | None, precision: Precision, empty: bool
) -> tuple[PackedLlava, Any, list[Part]]:
    """The network as stage `name` trains it, its processor, and what is trained, part by part.

    Args:
        start_from: the weights to start from; None: the base weights.
        empty: on the meta device.
    """
    pl.seed_everything(config.seed, verbose=False)
    with quiet():
        model, processor = begin(config, start_from, empty=empty, template=template_of(config, name))
        check_patches(model.hf.model.vision_tower, config.encoder)
        parts = make_trainable(model, config, name, precision)
        if start_from is not None and start_from.goes_on and not empty:
            load_adapters(model.hf, start_from.key, start_from.path)
        if not empty and (broken := broken_tensors(model)):
            source = "encoder.path, llm.path" if start_from is None else f"{start_from.key}={start_from.path}"
            raise UserError(
                f"{source}: the weights that stage {name} starts from hold NaN or infinity ({named(broken)}); get "
                "their files anew, or start from others (init_from)"
            )
    return model, processor, parts


def uses_adapters(config: Config, name: str) -> bool:
    """Whether stage `name` trains adapters in place of the LLM's own weights."""
    stage = config.stage[name]
    return stage.use_peft and config.peft.name != "none" and stage.train_llm


def make_trainable(model: PackedLlava, config: Config, name: str, precision: Precision) -> list[Part]:
    """Set a model up as stage `name` trains it: adapters, frozen parts and their dtype, gradient checkpointing.

    Returns:
        What is trained, part by part.
    """
    stage, adapters = config.stage[name], uses_adapters(config, name)
    if adapters:
        add_adapters(model, config.peft, quantize=precision.dtype)
    parts = freeze(model, stage, adapters)
    store_frozen(model, precision.dtype)
    if stage.gradient_checkpointing:
        checkpoint_layers(model, stage.checkpointed_layers)
    if config.trainer.compile:
        compile_layers(model)
    return parts


def kernel_lines(model: PackedLlava, device: torch.device, dtype: torch.dtype) -> str:
    """What attends and what takes the loss on a device, and why; UserError where what is asked for cannot run."""
    attends, why = backend_for(model.execution.attention, model.hf.model.language_model.config, device, dtype)
    kernel, reason = loss_kernel(device)
    taken = f"chunks of {model.execution.logits_chunk} tokens" if kernel == "chunked" else kernel
    return f"attention: {attends.name} ({why})\nlogits: {taken} ({reason})"


def match_projector(model: PackedLlava, images: list[Tensor]) -> None:
    """Fit the new projector to what stage 1 keeps of these images [3, H, W]."""
    with torch.no_grad():
        features = [model.kept_features(torch.stack(images[at : at + 8])) for at in range(0, len(images), 8)]
    fit_projector(model, torch.cat(features) if features else torch.empty((0, 1)))


def fit_projector(model: PackedLlava, kept: Tensor) -> None:
    """Fit the new projector to these features [K, Dv]."""
    table = model.hf.model.language_model.embed_tokens
    rms = float(table.weight.detach().float().square().mean().sqrt())
    rms *= float(getattr(table, "embed_scale", 1.0))  # Gemma scales what it looks up
    match_features(model.hf.model.multi_modal_projector, kept, rms)


def named(tensors: list[str]) -> str:
    return tensors[0] if len(tensors) == 1 else f"{tensors[0]} (and {len(tensors) - 1} more)"
