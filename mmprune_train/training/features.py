"""The feature cache in training: filled before a stage starts, and then read in place of the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mmprune_train.config.schema import Config
from mmprune_train.data.records import Record
from mmprune_train.features.fill import Report, fill
from mmprune_train.features.settings import feature_settings
from mmprune_train.features.store import ImageFeatures
from mmprune_train.model.images import ImageSide
from mmprune_train.storage.assets import cache_dir
from mmprune_train.training.inputs import stage_image_processor, stage_reader
from mmprune_train.workers import ALONE, Ranks


def askers(records: Sequence[Record]) -> dict[Path, str]:
    """Every image of the records, with the first sample that shows it."""
    found: dict[Path, str] = {}
    for record in records:
        for path in record.images:
            found.setdefault(path, record.told)
    return found


def fill_for(
    config: Config,
    stage: str,
    model: ImageSide,
    images: Mapping[Path, str],
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> tuple[ImageFeatures, Report]:
    """Fill the cache with images (path -> who asks) as stage `stage` prepares them.

    Args:
        model: its encoder frozen, the weights in `dtype`.
    """
    chosen = config.trainer.feature_cache_dir
    return fill(
        model,
        feature_settings(model, stage_image_processor(config, stage).to_dict(), dtype),
        config.encoder.name,
        Path(chosen).expanduser() if chosen else cache_dir() / "features",
        images,
        stage_reader(config, stage),
        dtype,
        device,
        config.trainer.num_workers,
        ranks,
    )
