"""Whether a folder's weights are those that its config.json describes: by transformers' own names, without reading
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from mmprune_train.errors import UserError
from mmprune_train.model.weights.auto import DATA_ALONE
from mmprune_train.model.weights.files import Tensors
from mmprune_train.quiet import no_bars

REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Let `from_pretrained` report a wrong shape as it reports wrong keys."""
FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_whole(
    model_class: Any,
    folder: object,
    source: object = None,
    beside: tuple[str, ...] = (),
    absent: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """`model_class.from_pretrained(folder, **options)`, of which no key may be missing, left over or of another shape.

    Args:
        source: for messages; None: the folder.
        beside: parts of names that are not of this model and may be there.
        absent: how names begin that the folder may lack.
    """
    with no_report():
        model, info = model_class.from_pretrained(folder, weights_only=True, **DATA_ALONE, **options, **REPORT)
    extra = [name for name in info["unexpected_keys"] if not any(part in name for part in beside)]
    missing = [name for name in info["missing_keys"] if not name.startswith(absent)]
    _complete({**info, "unexpected_keys": extra, "missing_keys": missing}, source or folder)
    return model


def _complete(info: Mapping[str, Any], source: object) -> None:
    for fault in FAULTS:
        if keys := sorted(map(_told, info.get(fault) or [])):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{source}: {fault.replace('_', ' ')}: {', '.join(keys[:3])}{more}; the folder does not hold the model "
                "its config.json describes (a wrong path, a half-written save, or another architecture)"
            )


def _told(key: Any) -> str:
    if isinstance(key, str):
        return key
    name, there, wanted = key
    return f"{name} {list(there)} where config.json makes it {list(wanted)}"


@contextmanager
def no_report() -> Iterator[None]:
    """Without transformers' table of keys that do not fit: `load_whole` says it in a line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_outline(source: object, config: PreTrainedConfig, tensors: Tensors, beside: tuple[str, ...] = ()) -> None:
    """Raise UserError where a language model or LLaVA and the headers of its files do not fit; see `load_whole`."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), LlavaForConditionalGeneration)
    state = {name: torch.empty(entry.shape, device="meta") for name, entry in tensors.items()}
    with no_bars():  # nothing is loaded
        load_whole(model_class, None, source, beside, config=config, state_dict=state, device_map="meta")
