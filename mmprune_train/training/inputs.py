"""From the data config to a stage's loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mmprune_train.config.schema import Config
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.data.loader import TrainLoader, train_loader
from mmprune_train.data.records import read_records
from mmprune_train.data.sources import split_files
from mmprune_train.data.templates import get_template


def template_of(config: Config, name: str) -> str:
    """The conversation template of stage `name`; `auto` is the LLM's own."""
    template = config.stage[name].template
    return config.llm.template if template == "auto" else template


def stage_loader(config: Config, name: str, tokenizer: Any, image_tokens: int, rank: int, world: int) -> TrainLoader:
    """Batches of stage `name` for one rank.

    Args:
        tokenizer: with the image token in its vocabulary.
        image_tokens: visual tokens of one image.
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
        config.seed,
        rank,
        world,
        config.trainer.num_workers,
        stage.group_by_modality,
        stage.samples_per_image,
    )


def spread_images(loader: TrainLoader, count: int) -> Iterator[Tensor]:
    """Up to `count` images [3, H, W] spread evenly over a stage's samples; the same on every rank."""
    seen = [(record, path) for record in loader.dataset.records for path in record.images[:1]]
    for record, path in seen[:: max(1, len(seen) // count)][:count]:
        yield loader.dataset.reader(path, f"{record.where} (id {record.id})")
