"""Adapters of a stage as PEFT reads them, with what says which weights they belong to; and whether what they were
merged into answers as they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmprune_train.config.compose import load_pruner
from mmprune_train.errors import UserError
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import ADAPTER_FILE, PROJECTOR_FILE
from mmprune_train.model.weights.base import RECORD, Base
from mmprune_train.model.weights.folders import ADAPTER_CONFIG
from mmprune_train.model.weights.places import public_name
from mmprune_train.storage.secrets import masked_texts

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Dtype that merged weights were rounded to -> the largest difference of logits, of the largest logit. Our choice."""
TOKENS = 12
"""Text tokens around the image of the probe."""


def save_adapter(
    source: Path, folder: Path, dtype: torch.dtype | None, base: Base, settings: dict[str, Any], processor: Any
) -> int:
    """Write a stage's `adapters/` as a folder of its own; return the bytes of its weights.

    Args:
        dtype: None: as they are.
        base: recorded beside them, by content.
        settings: what a model's config.json has for `load_model`.
        processor: of the model that they made; None: not known.
    """
    size = 0
    for name in (ADAPTER_FILE, PROJECTOR_FILE):
        if (source / name).is_file():
            weights = {key: value.to(dtype or value.dtype) for key, value in load_file(source / name).items()}
            save_file(weights, folder / name, {"format": "pt"})
            size += sum(value.numel() * value.element_size() for value in weights.values())
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if named := config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = public_name(named)
    for name, value in ((ADAPTER_CONFIG, config), (RECORD, {"base": base, "mmprune": settings})):
        (folder / name).write_text(json.dumps(masked_texts(value), indent=2) + "\n", encoding="utf-8")
    if processor is not None:
        processor.save_pretrained(folder)
    return size


@torch.no_grad()
def probe(model: PackedLlava) -> Tensor:
    """Logits [L, V] of one fixed prompt with one image of noise, dense, on the host in float32."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side = getattr(config.vision_config, "image_size", 0)
    pixels = torch.randn((1, 3, side, side), generator=generator)
    words = torch.randint(1, config.text_config.vocab_size, (TOKENS,), generator=generator)
    words[words == config.image_token_id] -= 1
    image = torch.full((model.features_of(pixels),), config.image_token_id)
    ids = torch.cat([words[:2], image, words[2:]])[None]
    with model.pruned_by(load_pruner("none")):
        return model.eval()(input_ids=ids, pixel_values=pixels).logits[0].float()


def check_parity(unmerged: Tensor, merged: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of two probes and the largest logit.

    Args:
        dtype: what the merged weights were rounded to.
    Raises:
        UserError: they differ by more than that explains.
    """
    largest, difference = float(unmerged.abs().max()), float((merged - unmerged).abs().max())
    if not difference <= TOLERANCE[dtype] * max(largest, 1.0):
        raise UserError(
            f"ckpt: the merged weights answer otherwise than the adapters beside their base (logits differ by "
            f"{difference:.2g} of {largest:.2g}): the base, the adapters or the merged weights are not as they were "
            "at the end of the training; put them back, or give export.format=adapter, which merges nothing"
        )
    return {"largest_difference": difference, "largest_logit": largest}
