"""A model in the layout of LLaVA's own code: the language model with `model.mm_projector.*` inside, the vision tower by
its name, the projector once more as `mm_projector.bin`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.model.export.hf import (
    dtype_named,
    flat_rope,
    published,
    save_beside,
    settings_of,
    write_config,
)
from mmprune_train.model.export.shards import write_shards
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.weights.folders import PROJECTOR_BIN
from mmprune_train.model.weights.original import LAYERS, TEXT_TYPES

PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower."
CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM", "qwen2": "LlavaQwenForCausalLM"}
"""Type of the language model -> class of LLaVA's code (Qwen's is LLaVA-NeXT's)."""


def save_llava(
    model: PackedLlava,
    processor: Any,
    folder: Path,
    dtype: torch.dtype,
    tower: str,
    tower_inside: bool,
    shard_bytes: int = 5 << 30,
) -> int:
    """Write a folder for LLaVA's own code, the pruner's settings in its config.json for this project; return the bytes
    of its weights.

    Args:
        tower: name of the vision tower, a hub id or a folder's name.
        tower_inside: its weights are not those of that name, and go into the checkpoint.
    Raises:
        UserError: that code has no such language model, vision tower or projector; and as `write_shards`.
    """
    config = _config(model, processor, dtype, tower, tower_inside)
    weights = original_names(published(model.hf), config["mm_projector_type"])
    projector = {name: value for name, value in weights.items() if name.startswith(PROJECTOR)}
    if not tower_inside:
        weights = {name: value for name, value in weights.items() if not name.startswith(TOWER)}
    size = write_shards(weights, folder, dtype, shard_bytes)
    torch.save({name: value.detach().cpu().to(dtype) for name, value in projector.items()}, folder / PROJECTOR_BIN)
    write_config(folder, config)
    save_beside(model, processor, folder)
    return size


def original_names(weights: dict[str, Tensor], projector: str) -> dict[str, Tensor]:
    """Published weights by the names of LLaVA's own code."""
    layers = {theirs: ours for ours, theirs in LAYERS[projector].items()}
    found = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part == "multi_modal_projector":
            layer, what = rest.split(".")
            if layer in layers:  # of a linear one the second is the identity
                found[PROJECTOR + ".".join(filter(None, (layers[layer], what)))] = value
        else:
            found[(TOWER if part == "vision_tower" else "") + rest] = value
    return found


def _config(model: PackedLlava, processor: Any, dtype: torch.dtype, tower: str, tower_inside: bool) -> dict[str, Any]:
    hf = model.hf.config
    text, vision = hf.text_config, hf.vision_config
    types = {ours: theirs for theirs, ours in TEXT_TYPES.items()}
    refused = []
    if text.model_type not in types:
        refused.append(f"a language model of type {text.model_type} (it has {', '.join(types)})")
    if vision.model_type != "clip_vision_model":
        refused.append(f"a vision tower of type {vision.model_type} (it has CLIP's)")
    if not isinstance(hf.vision_feature_layer, int) or hf.vision_feature_select_strategy != "default":
        refused.append("features of several layers, or with the CLS token")
    if refused:
        raise UserError(
            f"export.format=llava: LLaVA's own code has not {'; nor '.join(refused)}; take export.format=hf"
        )
    return {
        **text.to_dict(),
        **flat_rope(text),
        **dtype_named(dtype),
        "architectures": [CLASSES[text.model_type]],
        "model_type": types[text.model_type],
        "mm_vision_tower": tower,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "linear" if hf.projector_hidden_act == "linear" else "mlp2x_gelu",
        "mm_vision_select_layer": hf.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_token_index": hf.image_token_id,  # SGLang's; LLaVA's own code has none
        "image_aspect_ratio": "pad" if processor.image_processor.do_pad else "square",
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": tower_inside,
        "mmprune": settings_of(model),
    }
