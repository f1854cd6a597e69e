"""What features depend on, and the folder name that follows: a changed setting never finds another's features."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmprune_train.config.pruner import places
from mmprune_train.config.pruner_vision import projects
from mmprune_train.errors import UserError
from mmprune_train.model.images import ImageSide
from mmprune_train.storage.assets import sha256_of

FORMAT = 1
"""To be raised whenever the shards are laid out differently."""

NEVER_RUN = "pooler."
"""Weights of a tower that no feature depends on; random where a checkpoint has none."""

LIBRARIES = ("pillow", "scikit-learn", "transformers")
"""Who resizes images, counts outliers, and holds the encoder's code."""
CODE = tuple(
    f"mmprune_train.{name}"
    for name in (
        "data.fitting", "data.images", "data.rgb", "model.images", "model.vision", "packed.patches", "pruning.budgets",
        "pruning.parts", "pruning.views", "pruning.vision_stage",
    )
)  # fmt: skip
"""Modules that make the features, beside those of the chosen components; a change in any of them may change those."""


def feature_settings(model: ImageSide, preparation: Mapping[str, Any], dtype: torch.dtype) -> dict[str, object]:
    """Everything that the features of an image depend on, besides the image.

    Args:
        model: its encoder as it computes: frozen weights already in `dtype`.
        preparation: of images, the settings of their image processor.
        dtype: what is computed in, and what features are stored in.
    """
    tower: Any = model.hf.model.vision_tower
    stage = model.pruner.settings.vision
    decides = {key: value for key, value in asdict(stage).items() if key != "positions"}  # which are given later
    scorer = {} if model.scorer is None else {"scorer_weights_sha256": weights_hash(model.scorer)}
    return {
        **scorer,
        "format": FORMAT,
        "encoder": _plain(tower.config.to_dict()),
        "encoder_weights_sha256": weights_hash(tower),
        "feature_layer": model.config.vision_feature_layer,
        "patches_without_cls": model.config.vision_feature_select_strategy == "default",
        "image_preparation": _plain(preparation),
        "stage_1": decides if stage.enabled else "off: every patch is kept",
        "stage_1_code_sha256": {place: _source_hash(place) for place in places(model.pruner.settings, "pruner.vision")},
        "projector_weights_sha256": weights_hash(model.hf.model.multi_modal_projector) if projects(stage) else None,
        "code_sha256": {name: _source_hash(name) for name in CODE},
        "dtype": str(dtype).removeprefix("torch."),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def folder_name(name: str, settings: Mapping[str, object]) -> str:
    """The encoder's name, for people, and a hash of the settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(NEVER_RUN):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers config without what only tells where it came from."""
    ignored = ("transformers_version", "dtype", "torch_dtype", "architectures", "processor_class")
    return {key: value for key, value in settings.items() if key not in ignored and not key.startswith("_")}


def _source_hash(function: str) -> str:
    found = importlib.util.find_spec(function.split(":")[0])
    if found is None or found.origin is None:
        raise UserError(
            f"trainer.feature_cache: there is no source file of {function}; set trainer.feature_cache=false"
        )
    return sha256_of(Path(found.origin))
