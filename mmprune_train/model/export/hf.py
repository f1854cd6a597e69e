"""A model in Hugging Face's layout, under the names that published LLaVA folders have, which engines read, too."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedConfig, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmprune_train.errors import UserError
from mmprune_train.model.export.shards import write_shards
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.question import FOLDER
from mmprune_train.model.scorer import save_scorer
from mmprune_train.storage.secrets import masked

TOWER = "vision_tower."
WRAPPED = ("clip_vision_model", "siglip_vision_model")
"""Towers whose published names have a `vision_model.` that transformers took out of its own modules in 5.6."""


def save_hf(
    model: PackedLlava, processor: ProcessorMixin, folder: Path, dtype: torch.dtype, shard_bytes: int = 5 << 30
) -> int:
    """Write a folder for `from_pretrained`, vLLM and this project, the pruner's settings in its config.json; return the
    bytes of its weights. Raises as `write_shards`."""
    size = write_shards(published(model.hf), folder, dtype, shard_bytes)
    model.hf.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": [type(model.hf).__name__], **dtype_named(dtype), "mmprune": settings_of(model)}
    for part in ("text_config", "vision_config"):
        config[part] |= dtype_named(dtype)
    config["text_config"] |= {"architectures": [architecture(model.hf)], **flat_rope(model.hf.config.text_config)}
    write_config(folder, config)
    save_beside(model, processor, folder)
    return size


def published(hf: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The weights by their names in published folders, each once: of tied embeddings the input's.

    Raises:
        UserError: they are quantised.
    """
    if getattr(hf, "hf_quantizer", None) is not None:
        raise UserError(
            "ckpt: its weights are quantised, and such cannot be exported; give the bf16, fp16 or fp32 ones"
        )
    found = revert_weight_conversion(hf, hf.state_dict())
    if hf.lm_head.weight is hf.get_input_embeddings().weight:
        found.pop("language_model.lm_head.weight")
    more = "vision_model." if hf.config.vision_config.model_type in WRAPPED else ""
    return {name.replace(TOWER, TOWER + more, 1) if name.startswith(TOWER) else name: t for name, t in found.items()}


def settings_of(model: PackedLlava) -> dict[str, Any]:
    """What `load_model` reads from a folder's config.json beside Hugging Face's own."""
    return {"pruner": asdict(model.pruner.settings), "template": model.template}


def architecture(hf: LlavaForConditionalGeneration) -> str:
    """Class name of the language model inside, by which engines choose theirs."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf.config.text_config.model_type])


def dtype_named(dtype: torch.dtype) -> dict[str, str]:
    """Under the key of now and that of transformers 4."""
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


def flat_rope(text: PreTrainedConfig) -> dict[str, Any]:
    """RoPE's settings as transformers 4, and what reads its configs, has them: without, they would take 10,000 for the
    base of any model."""
    rope = dict(getattr(text, "rope_parameters", None) or {})
    found = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    return found | ({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json, without secrets and without where its parts were loaded from."""
    text = json.dumps(_placeless(config), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(masked(text), encoding="utf-8")


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _placeless(part) for key, part in value.items() if key != "_name_or_path"}
    return [_placeless(part) for part in value] if isinstance(value, list | tuple) else value


def save_beside(model: PackedLlava, processor: ProcessorMixin, folder: Path) -> None:
    """How it generates, its tokenizer, chat template and image processor, its pruner's text tower and weights."""
    model.hf.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if model.question is not None:
        model.question.save(folder / FOLDER)
    if model.scorer is not None:
        save_scorer(model.scorer, folder)
