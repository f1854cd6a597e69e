"""transformers' Auto classes as they are called here: of a folder only data is read, never code of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from mmprune_train.errors import UserError

DATA_ALONE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained`. Left out, transformers would ask on the terminal whether to run a folder's code."""


def config_of(folder: object) -> Any:
    """Raises UserError where the folder needs code of its own, and of a broken one what transformers raises."""
    with _told(folder):
        return AutoConfig.from_pretrained(folder, **DATA_ALONE)


def tokenizer_of(folder: object, **options: Any) -> Any:
    """Raises as `config_of`."""
    with _told(folder):
        return AutoTokenizer.from_pretrained(folder, **options, **DATA_ALONE)


def processor_of(folder: object) -> Any:
    """Raises as `config_of`."""
    with _told(folder):
        return AutoProcessor.from_pretrained(folder, **DATA_ALONE)


@contextmanager
def _told(folder: object) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{folder} needs code of its own (auto_map), which is never run here; give a folder whose config, "
            "tokenizer and processor are classes of transformers"
        ) from None
