"""From the data config to a stage's loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mmprune_train.config.schema import Config, PrunerConfig
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.data.lengths import VisualTokens
from mmprune_train.data.loader import TrainLoader, train_loader
from mmprune_train.data.records import read_records
from mmprune_train.data.sources import split_files
from mmprune_train.data.templates import get_template


def template_of(config: Config, name: str) -> str:
    """The conversation template of stage `name`; `auto` is the LLM's own."""
    template = config.stage[name].template
    return config.llm.template if template == "auto" else template


def stage_loader(
    config: Config,
    name: str,
    tokenizer: Any,
    image_tokens: int,
    rank: int,
    world: int,
    visual_tokens: VisualTokens | None = None,
) -> TrainLoader:
    """Batches of stage `name` for one rank.

    Args:
        tokenizer: with the image token in its vocabulary.
        image_tokens: visual tokens of one image.
        visual_tokens: those that stage 1 leaves of an image, where they are known before training.
    """
    stage = config.stage[name]
    annotations, images = split_files(config.data, name)
    return train_loader(
        read_records(annotations, images, getattr(config.data, name).limit),
        get_template(template_of(config, name), tokenizer),
        tokenizer,
        ImageReader(image_processor(config.encoder, stage.image_aspect_ratio)),
        image_tokens,
        stage.max_length,
        stage.batch_size,
        stage.global_batch_size,
        config.seed,
        rank,
        world,
        config.trainer.num_workers,
        stage.group_by_modality,
        stage.samples_per_image,
        stage.token_budget,
        visual_tokens or whole_images(config.pruner, image_tokens),
    )


def whole_images(pruner: PrunerConfig, image_tokens: int) -> VisualTokens | None:
    """All patches of any image, where stage 1 is off or a schedule moves it, so that a step may leave them all."""
    moves = pruner.schedule.name != "constant" and "vision" in pruner.schedule.applies_to
    return None if pruner.vision.enabled and not moves else lambda image: image_tokens


def spread_images(loader: TrainLoader, count: int) -> Iterator[Tensor]:
    """Up to `count` images [3, H, W] spread evenly over a stage's samples; the same on every rank."""
    seen = [(record, path) for record in loader.dataset.records for path in record.images[:1]]
    for record, path in seen[:: max(1, len(seen) // count)][:count]:
        yield loader.dataset.reader(path, f"{record.where} (id {record.id})")
