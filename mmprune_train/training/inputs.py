"""From the data config to a stage's loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.schema import Config
from mmprune_train.data.dataset import Features
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.data.lengths import VisualTokens
from mmprune_train.data.loader import TrainLoader, train_loader
from mmprune_train.data.records import Annotations, Record, read_annotations
from mmprune_train.data.sources import image_folder, split_files
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.training.stream import steps_of


def template_of(config: Config, name: str) -> str:
    """The conversation template of stage `name`; `auto` is the LLM's own."""
    template = config.stage[name].template
    return config.llm.template if template == "auto" else template


def stage_annotations(config: Config, name: str) -> Annotations:
    """What stage `name` uses of its annotation file."""
    return read_annotations(*split_files(config.data, name), config.data.part(name).limit)


@dataclass(frozen=True)
class Extent:
    """How much of its annotation file a stage sees."""

    steps: int
    """Optimizer steps."""
    used: int
    """Samples."""
    available: int
    """Samples in the file."""
    passes: float
    """Over the used samples."""
    text: str
    """All this in words, with the keys that limit it."""


def stage_extent(config: Config, name: str, data: Annotations) -> Extent:
    """What stage `name` sees of `data`, its annotation file."""
    stage, limit, used = config.stage[name], config.data.part(name).limit, len(data.records)
    size = stage.global_batch_size
    if size > used:
        limited = f", data.{name}.limit={limit}" if used < data.available else ""
        raise UserError(
            f"stage.{name}.global_batch_size={size} is more than the {used} samples of data.{name}{limited}: one step "
            f"would see samples twice; set it to {used} or less, or give more data"
        )
    whole = steps_of(used, stage.epochs, size, None)
    steps = whole if stage.max_steps is None else stage.max_steps
    passes = steps * size / used
    decimals = 1 if round(passes, 1) == round(passes, 2) or passes >= 10 else 2
    lines = [
        f"{used:,} of {data.available:,} samples, {steps:,} steps of {size}: {passes:.{decimals}f} passes over the data"
    ]
    if used < data.available:
        lines.append(f"samples are limited by data.{name}.limit={limit} (set it to null for all)")
    if steps != whole:
        epochs = f"stage.{name}.epochs={stage.epochs}, {whole:,} steps"
        lines.append(f"steps are set by stage.{name}.max_steps={steps} (set it to null for {epochs})")
    return Extent(steps, used, data.available, passes, "\n".join(lines))


def stage_image_processor(config: Config, name: str) -> LlavaImageProcessorPil:
    """Prepares images as stage `name` is trained with them."""
    return image_processor(config.encoder, config.stage[name].image_aspect_ratio, config.data.exif_orientation)


def stage_reader(config: Config, name: str) -> ImageReader:
    """Reads images as stage `name` prepares them."""
    return ImageReader(stage_image_processor(config, name), image_folder(config.data, name))


def stage_loader(
    config: Config,
    name: str,
    tokenizer: Any,
    image_tokens: int,
    rank: int,
    world: int,
    records: Sequence[Record] | None = None,
    features: Features | None = None,
) -> TrainLoader:
    """Batches of stage `name` for one rank.

    Args:
        tokenizer: with the image token in its vocabulary.
        image_tokens: visual tokens of one image.
        records: of the stage, where they have been read.
        features: of all its images, where the feature cache is on; then it is known what stage 1 keeps of them.
    """
    return train_loader(
        stage_annotations(config, name).records if records is None else records,
        get_template(template_of(config, name), tokenizer),
        tokenizer,
        stage_reader(config, name),
        image_tokens,
        config.stage[name],
        config.seed,
        rank,
        world,
        config.trainer.num_workers,
        whole_images(config.pruner, image_tokens) if features is None else features.kept,
        features,
    )


def whole_images(pruner: PrunerConfig, image_tokens: int) -> VisualTokens | None:
    """All patches of any image, where stage 1 is off or a schedule moves it, so that a step may leave them all."""
    moves = pruner.schedule.name != "constant" and "vision" in pruner.schedule.applies_to
    return None if pruner.vision.enabled and not moves else lambda image: image_tokens


def evenly_chosen_paths(records: Sequence[Record], count: int) -> list[tuple[Path, str]]:
    """Up to `count` images spread evenly over a stage's samples, each with the sample; the same on every rank."""
    seen = [(path, record.told) for record in records for path in record.images[:1]]
    return seen[:: max(1, len(seen) // count)][:count]


def evenly_chosen_images(loader: TrainLoader, count: int) -> Iterator[Tensor]:
    """Those images [3, H, W]."""
    for path, where in evenly_chosen_paths(loader.dataset.records, count):
        yield loader.dataset.reader(path, where)
