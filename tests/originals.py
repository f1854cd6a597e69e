"""Folders in the original LLaVA formats, written from a llava-hf model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

FAMILIES = {"llama": "llava_llama", "mistral": "llava_mistral"}


def projector_of(hf: LlavaForConditionalGeneration, prefix: str = "model.mm_projector.") -> dict[str, Tensor]:
    """The two-layer projector as LLaVA numbers it."""
    layers = {"linear_1": "0", "linear_2": "2"}
    state = hf.model.multi_modal_projector.state_dict()
    return {f"{prefix}{layers[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in state.items()}


def write_original(
    folder: Path, hf: LlavaForConditionalGeneration, tokenizer: Any, tower: bool = True, bins: bool = False, **more: Any
) -> Path:
    """A checkpoint as LLaVA's own training saves it.

    Args:
        tower: the vision tower is inside, too.
        bins: two .bin shards with their index in place of one safetensors file.
        more: fields of config.json.
    """
    folder.mkdir()
    text = hf.config.text_config.to_dict()
    vocabulary = text["vocab_size"]
    weights = {f"model.{name}": value for name, value in hf.model.language_model.state_dict().items()}
    weights |= {"lm_head.weight": hf.lm_head.weight.data[:vocabulary], **projector_of(hf)}
    if tower:
        state = hf.model.vision_tower.state_dict()
        weights |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in state.items()}
    weights = {name: value.clone() for name, value in weights.items()}
    own = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": FAMILIES[text["model_type"]],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": hf.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps({**text, **own, **more}))
    if bins:
        names = sorted(weights)
        halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, some in halves.items():
            torch.save({name: weights[name] for name in some}, folder / file)
        where = {name: file for file, some in halves.items() for name in some}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder
