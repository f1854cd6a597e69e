"""Secrets among the settings: left out of config.yaml, and of what makes a run the run it is.

Beside those that sound like one (`storage/secrets.py`) that is all text that `${oc.env:X}` gives, unless the key takes
a path or a name of this project's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmprune_train.config.tree import leaves
from mmprune_train.config.typed import PATHS, WORDS
from mmprune_train.storage.secrets import MASK, hide, masked, note_text, sounds_secret

_OPEN = re.compile(
    r"(task|experiment_name|run_id|stages|init_adapters|knee|pruner|projector|strategy|peft|optim|trainer|stage|evaluate"
    r"|generate|bench|calibrate|plan|sweep|report)(\..*)?|.*\.(name|source|template|mode)(\..*)?"
)
"""Keys whose text is a name, and no secret."""
_given: set[tuple[str, str]] = set()
"""Keys with the text that the environment gives them."""


def note_settings(tree: Mapping[str, Any]) -> set[str]:
    """Learn the secrets of a composed config, its interpolations as they are written; returns the keys whose text the
    environment gives and nothing may tell."""
    keys = set()
    for key, value in leaves(tree, lists=True):
        if not isinstance(value, str):
            continue
        names = note_text(value)
        if names and (any(map(sounds_secret, names)) or not _is_open(key)):
            keys.add(key)
        if sounds_secret(key) and not names:
            hide(value)
    return keys


def note_given(keys: set[str], tree: Mapping[str, Any]) -> None:
    """Learn what the environment gives these keys of a config, of which all is filled in."""
    _given.update((key, value) for key, value in leaves(tree, lists=True) if key in keys)


def masked_settings(tree: Any, key: str = "") -> Any:
    """Settings as they may be written, and compared with those that were."""
    if isinstance(tree, Mapping):
        return {name: masked_settings(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [masked_settings(value, f"{key}[{place}]") for place, value in enumerate(tree)]
    if not isinstance(tree, str) or not tree:
        return tree
    return MASK if (key, tree) in _given or sounds_secret(key) else masked(tree)


def _is_open(key: str) -> bool:
    last = re.sub(r"\[\d+\]$", "", key).rpartition(".")[2]
    return last in PATHS or key in WORDS or _OPEN.fullmatch(key) is not None
