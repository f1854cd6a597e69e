"""The library's components by name, ready to be called."""

from __future__ import annotations

from dataclasses import replace

from mmprune_train.components.declare import KEYS
from mmprune_train.components.registry import library
from mmprune_train.pruning.parts import Part, load_part, new_weights
from mmprune_train.pruning.views import VisionView


def loaded(kind: str) -> dict[str, Part]:
    """All components of a kind, with their default parameters."""
    key = next(key for key, held in KEYS.items() if held == kind)
    return {name: load_part(kind, name, key) for name in library()[kind]}


def with_weights(view: VisionView, score: str, question_width: int | None = None) -> VisionView:
    """The view with new weights, where a stage-1 score has some."""
    part = VISION_SCORES[score]
    if not part.component.weights:
        return view
    return replace(view, weights=new_weights(part, width=view.patches.shape[2], question_width=question_width).eval())


VISION_SCORES = loaded("vision_score")
LANGUAGE_SCORES = loaded("language_score")
SELECTIONS = loaded("selection")
LANGUAGE_SELECTIONS = loaded("language_selection")
MERGES = loaded("merge")
