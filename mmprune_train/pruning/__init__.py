"""Pruning of visual and text tokens: scores, budgets, selection, packed sequence and pruner. Needs torch alone; the
budget `lof` also scikit-learn, imported when it is used. The decorators are for components of your own.
"""

from mmprune_train.components.declare import (
    Range,
    budget,
    language_merge,
    language_score,
    language_selection,
    merge,
    selection,
    vision_score,
)
from mmprune_train.packed.sequence import IGNORE, Kind, PackedSequence
from mmprune_train.packed.trace import PruningTrace
from mmprune_train.pruning.budgets import available_budgets, find_knee
from mmprune_train.pruning.pruner import Pruner
from mmprune_train.storage.conf import options


def available_pruners() -> list[str]:
    """Names that `pruner=` on the command line and `load_model(..., pruner=)` take."""
    return options("pruner")


__all__ = [
    "IGNORE",
    "Kind",
    "PackedSequence",
    "Pruner",
    "PruningTrace",
    "Range",
    "available_budgets",
    "available_pruners",
    "budget",
    "find_knee",
    "language_merge",
    "language_score",
    "language_selection",
    "merge",
    "selection",
    "vision_score",
]
