"""The library's components by name, ready to be called."""

from __future__ import annotations

from mmprune_train.components.declare import KEYS
from mmprune_train.components.registry import library
from mmprune_train.pruning.parts import Part, load_part


def loaded(kind: str) -> dict[str, Part]:
    """All components of a kind, with their default parameters."""
    key = next(key for key, held in KEYS.items() if held == kind)
    return {name: load_part(kind, name, key) for name in library()[kind]}


VISION_SCORES = loaded("vision_score")
LANGUAGE_SCORES = loaded("language_score")
SELECTIONS = loaded("selection")
LANGUAGE_SELECTIONS = loaded("language_selection")
MERGES = loaded("merge")
