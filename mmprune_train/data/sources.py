"""Where a data set lies, how a built-in one gets there, and the files of a split."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmprune_train.config.schema import DataConfig
from mmprune_train.data import easy_vqa
from mmprune_train.data.image_folder import ImageFolder
from mmprune_train.errors import UserError
from mmprune_train.storage.assets import cache_dir
from mmprune_train.storage.user_files import file_status, reason_of

SOURCES = {"easy_vqa": easy_vqa}
"""By the name in `data.source`, the module that fetches the data set: `prepare(root)` writes it in LLaVA's format and
returns its manifest; each `FORMAT` of what is written has a folder of its own in the cache."""


def data_root(data: DataConfig) -> Path:
    """`data.root`, else a folder of the data set's name in the cache."""
    if data.root:
        return Path(data.root).expanduser()
    source = SOURCES.get(data.source or "")
    return cache_dir() / "data" / (data.name if source is None else f"{data.name}-v{source.FORMAT}")


def prepare_data(data: DataConfig) -> dict[str, Any] | None:
    """Fetch and write a built-in data set, once; None: the files are the user's own, there is nothing to fetch."""
    if data.source is None:
        return None
    if data.source not in SOURCES:
        raise UserError(f"data.source={data.source!r} is unknown; choose one of {', '.join(SOURCES)} or null")
    return SOURCES[data.source].prepare(data_root(data))


def image_folder(data: DataConfig, part: str) -> ImageFolder:
    """The image folder of a split, which need not be there."""
    return ImageFolder(data_root(data) / Path(data.part(part).images).expanduser(), data.outside_images)


def split_files(data: DataConfig, part: str) -> tuple[Path, ImageFolder]:
    """(annotation file, image folder) of a training stage, or of `evaluate`.

    Raises UserError that names the key and how to get the data where either is missing.
    """
    split = data.part(part)
    remedy = data.how_to_get or f"set data.root and data.{part}.annotations"
    if not split.annotations:
        raise UserError(f"data.{part}.annotations is not set; name a file in LLaVA's format (docs/data.md)")
    annotations, images = data_root(data) / Path(split.annotations).expanduser(), image_folder(data, part)
    missing = []
    try:
        file_status(annotations)
    except OSError as error:
        why = "missing" if isinstance(error, FileNotFoundError) else f"not read ({reason_of(error)})"
        missing.append(f"data.{part}.annotations: {annotations} is {why}")
    if not os.path.isdir(images.path):  # noqa: PTH112 False, too, of what is no path at all
        missing.append(f"data.{part}.images: {images.path} is missing")
    if missing:
        raise UserError(f"{'; '.join(missing)}; {remedy}")
    return annotations, images
