"""What stage 1 looks at, as its settings say it. Standard library only."""

from __future__ import annotations

from mmprune_train.components.declare import Component
from mmprune_train.components.registry import find
from mmprune_train.config.pruner_schema import VisionStageConfig


def selection_of(stage: VisionStageConfig) -> Component:
    return find("selection", stage.selection, "pruner.vision.selection")


def projects(stage: VisionStageConfig) -> bool:
    """Whether stage 1 selects by what the projector makes of all patches; a selection without a declaration may."""
    if not stage.enabled:
        return False
    selection = selection_of(stage)
    return "projected" in selection.takes or (stage.space == "projected" and "features" in selection.reads)


def merges_projected(stage: VisionStageConfig) -> bool:
    """Whether stage 1 merges what the projector makes of all patches."""
    return stage.enabled and stage.merge != "none" and stage.merge_space == "projected"


def stage_one_scores(stage: VisionStageConfig) -> list[tuple[str, Component]]:
    """Key and score of each pass of stage 1 over the patches; empty where it is off."""
    passes = [("pruner.vision.score", stage.score)] if stage.enabled else []
    if passes and stage.recover.enabled:
        passes.append(("pruner.vision.recover.score", stage.recover.score))
    return [(key, find("vision_score", score, key)) for key, score in passes]


def reads_text(stage: VisionStageConfig) -> bool:
    """Whether stage 1 reads the question, so that an image is cut anew for each."""
    return reads_tower(stage) or reads_words(stage)


def reads_tower(stage: VisionStageConfig) -> bool:
    """Whether it reads it by CLIP's text tower."""
    return any("question" in score.reads for _, score in stage_one_scores(stage))


def reads_words(stage: VisionStageConfig) -> bool:
    """Whether it reads it word by word, as the LLM embeds it."""
    return stage.enabled and "words" in selection_of(stage).takes


def has_weights(stage: VisionStageConfig) -> bool:
    """Whether stage 1 scores by weights that are trained."""
    return any(score.weights for _, score in stage_one_scores(stage))
