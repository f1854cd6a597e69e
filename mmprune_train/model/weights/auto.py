"""transformers' Auto classes as they are called here: of a folder only data is read, never code of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from mmprune_train.errors import UserError

DATA_ALONE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained`. Left out, transformers would ask on the terminal whether to run a folder's code."""


def _of_data(kind: Any, folder: object, **options: Any) -> Any:
    """Raises UserError where the folder needs code of its own, and of a broken one what transformers raises."""
    try:
        return kind.from_pretrained(folder, **options, **DATA_ALONE)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{folder} needs code of its own (auto_map), which is never run here; give a folder whose config, "
            "tokenizer and processor are classes of transformers"
        ) from None


@contextmanager
def retold(message: Callable[[Exception], str], kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """What is raised inside as a UserError: a damaged file, or a wrong value, is answered by errors of any kind."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(message(error)) from error


config_of, tokenizer_of, processor_of = (partial(_of_data, kind) for kind in (AutoConfig, AutoTokenizer, AutoProcessor))
