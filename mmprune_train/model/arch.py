"""transformers' config of an `arch` of the user's, or a line that says which field describes no network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from mmprune_train.errors import UserError, nearest
from mmprune_train.storage.user_files import reason_of

OLDER = ("rope_theta", "rope_scaling", "torch_dtype")
"""Fields of earlier transformers, which still reads them."""


def arch_config(key: str, arch: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config of the fields of `key` (`llm.arch`), `model_type` among them. Raises UserError where there
    is no such model or field, or a value that transformers refuses."""
    kind, *fields = arch["model_type"], *(name for name in arch if name != "model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{key}.model_type={kind}: transformers has no such model{nearest(kind, CONFIG_MAPPING.keys())}"
        )
    config_class = CONFIG_MAPPING[kind]
    known = {*(item.name for item in dataclasses.fields(config_class)), *config_class.attribute_map, *OLDER}
    if not known.issuperset(fields):
        known.update(config_class().to_dict())  # what every config writes, so that one can be pasted whole
    for name in fields:
        if name not in known:
            raise UserError(f"{key}.{name}: a {kind} has no such field{nearest(name, known)}")
    with described(key, arch):
        return config_class(**{name: arch[name] for name in fields})


@contextmanager
def described(key: str, arch: Mapping[str, Any] | None = None) -> Iterator[None]:
    """While a network is made of an `arch`: what transformers says against it as a UserError.

    It says so with errors of any kind: a name that it looks up is a KeyError, heads that are 0 a ZeroDivisionError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = reason_of((isinstance(error, StrictDataclassError) and error.__cause__) or error)
        if isinstance(error, KeyError):  # the name of an activation or a kind of positions
            named = [name for name, value in _flat(key, arch or {}) if [value] == list(error.args)]
            told = f"{' or '.join(named) or key}={told}: transformers has no such"
        raise UserError(f"{key} describes no network ({told}); compare it with the files in conf/") from error


def _flat(key: str, arch: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in arch.items():
        yield f"{key}.{name}", value
        if isinstance(value, Mapping):
            yield from _flat(f"{key}.{name}", value)
