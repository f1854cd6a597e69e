"""transformers' Auto classes as they are called here: of a folder only data is read, never code of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from mmprune_train.errors import UserError

DATA_ALONE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained`. Left out, transformers would ask on the terminal whether to run a folder's code."""


def _reader(auto: Any) -> Callable[..., Any]:
    """`auto.from_pretrained`; it raises UserError for a folder that needs code of its own."""

    def read(folder: object, **options: Any) -> Any:
        try:
            return auto.from_pretrained(folder, **options, **DATA_ALONE)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{folder} needs code of its own (auto_map), which is never run here; give a folder whose config, "
                "tokenizer and processor are classes of transformers"
            ) from None

    return read


config_of, tokenizer_of, processor_of = map(_reader, (AutoConfig, AutoTokenizer, AutoProcessor))
