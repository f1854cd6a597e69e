"""LLaVA's own checkpoint formats: a language model with `model.mm_projector.*` (and perhaps the vision tower) inside, a
`mm_projector.bin` alone, and a LoRA folder's `non_lora_trainables.bin`."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mmprune_train.errors import UserError
from mmprune_train.model.weights.files import Entry, Tensors, read_tensors

TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""`model_type` of an original checkpoint -> transformers' type of its language model."""
LAYERS = {"mlp2x_gelu": {"0": "linear_1", "2": "linear_2"}, "linear": {"": "linear_1"}}
"""Kind of projector -> its layers in LLaVA's numbering -> in transformers' names."""
TOWER = "vision_tower."
BESIDE_LLM = ("mm_projector", "vision_tower", "image_newline")
"""Parts of the names of weights that are not the language model's."""

_PROJECTOR = re.compile(r"^(?:base_model\.model\.)?(?:model\.)*(?:mm_projector\.)?(?:(\d+)\.)?(weight|bias)$")


def text_config(key: str, config: dict[str, Any]) -> PreTrainedConfig:
    """transformers' config of the language model inside. Raises UserError for one that it does not have."""
    model_type = str(config.get("model_type"))
    if model_type not in TEXT_TYPES:
        raise UserError(
            f"{key}: an original LLaVA checkpoint of type {model_type!r} is not supported; supported: "
            f"{', '.join(TEXT_TYPES)}"
        )
    own = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "mmprune")
    foreign = ("mm_", "image_", "tune_mm", "freeze_mm", "unfreeze_mm", "use_mm", "tokenizer_")
    kept = {name: value for name, value in config.items() if name not in own and not name.startswith(foreign)}
    return AutoConfig.for_model(TEXT_TYPES[model_type], **kept)


def unsupported(config: dict[str, Any], tensors: Tensors) -> list[str]:
    """What an original checkpoint was trained with that this project does not do, as `key=value`."""
    found = [f"{key}=true" for key in ("mm_use_im_start_end", "mm_use_im_patch_token") if config.get(key)]
    if config.get("mm_patch_merge_type", "flat") not in (None, "flat"):
        found.append(f"mm_patch_merge_type={config['mm_patch_merge_type']}")
    if "anyres" in str(config.get("image_aspect_ratio", "")):
        found.append(f"image_aspect_ratio={config['image_aspect_ratio']}")
    if any("image_newline" in name for name in tensors):
        found.append("image_newline")
    return found


def projector_tensors(tensors: Tensors) -> Tensors:
    """The projector's weights among these by transformers' names; empty where there is none of a known kind, whole."""
    inside = {name: entry for name, entry in tensors.items() if "mm_projector" in name} or tensors
    found: dict[tuple[str, str], Entry] = {}
    for name, entry in inside.items():
        match = _PROJECTOR.match(name)
        if match is None:
            return {}
        found[match.group(1) or "", match.group(2)] = entry
    whole = {kind: {(layer, what) for layer in names for what in ("weight", "bias")} for kind, names in LAYERS.items()}
    layers: dict[str, str] = next((LAYERS[kind] for kind, parts in whole.items() if found.keys() == parts), {})
    return {f"{layers[layer]}.{what}": entry for (layer, what), entry in found.items()} if layers else {}


def load_projector(projector: LlavaMultiModalProjector, weights: Tensors) -> None:
    """Put these weights into a projector, in place. One of kind `linear` keeps the identity behind its layer."""
    values = read_tensors(weights)
    with torch.no_grad():
        for name, value in values.items():
            projector.get_parameter(name).copy_(value)


def tower_tensors(tensors: Tensors) -> Tensors:
    """The weights of a vision tower inside the checkpoint, by the names of CLIP's own checkpoints."""
    inside = {name.rsplit(TOWER, 1)[1]: entry for name, entry in tensors.items() if TOWER in name}
    return {name: entry for name, entry in inside.items() if not name.endswith("position_ids")}
