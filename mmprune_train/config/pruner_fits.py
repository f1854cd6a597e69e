"""Whether the pruner goes with the encoder, the LLM, the feature cache and `task=calibrate`."""

from __future__ import annotations

from mmprune_train.components.declare import Component
from mmprune_train.components.registry import declared
from mmprune_train.config.pruner import pruned_layers, running
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.pruner_vision import merges_projected, projects, reads_text, reads_words, stage_one_scores
from mmprune_train.config.schema import Config, EncoderConfig
from mmprune_train.errors import UserError


def encoder_has(encoder: EncoderConfig) -> set[str]:
    """What of that which components need an encoder has. The pooling head is SigLIP's, unless it is built without."""
    pools = encoder.arch.get("model_type") == "siglip_vision_model" and encoder.arch.get("vision_use_head", True)
    has = {
        "a CLS token": encoder.has_cls,
        "an attention pooling head": pools,
        "a CLIP text tower": encoder.text is not None,
    }
    return {part for part, there in has.items() if there}


def possible_scores(encoder: EncoderConfig) -> list[str]:
    """Stage-1 scores that an encoder can give."""
    has = encoder_has(encoder)
    return [name for name, score in declared()["vision_score"].items() if has.issuperset(score.needs)]


def check_pruner_fits(config: Config) -> None:
    """Raise UserError where the encoder or the LLM cannot give what the pruner asks."""
    vision, language = config.pruner.vision, config.pruner.language
    first, *others = possible_scores(config.encoder)
    for key, score in stage_one_scores(vision):
        for part in score.needs:
            if part not in encoder_has(config.encoder):
                textual = "choose encoder=clip_vit_l14_336 (or clip_vit_b32), or " if "question" in score.reads else ""
                raise UserError(
                    f"{key}={score.name} needs {part}, which encoder {config.encoder.name} does not have: "
                    f"{textual}add {key}={first} (or {', '.join(others)})"
                )
    if vision.enabled and vision.keep_cls and not config.encoder.has_cls:
        raise UserError(
            f"pruner.vision.keep_cls=true needs a CLS token, which encoder {config.encoder.name} does not have: add "
            "pruner.vision.keep_cls=false"
        )
    blocks = config.encoder.arch.get("num_hidden_layers")
    for key, layer, otherwise in (
        ("pruner.vision.layer", vision.layer, "the one that made the feature layer"),
        ("pruner.vision.recover.layer", vision.recover.layer, "that of pruner.vision.layer"),
    ):
        if vision.enabled and isinstance(layer, int) and blocks is not None and not -blocks <= layer < blocks:
            raise UserError(
                f"{key}={layer}: encoder {config.encoder.name} has {blocks} blocks, {-blocks}..{blocks - 1}; shares of "
                f"the depth (0.25) fit any, null takes {otherwise}"
            )
    depth = config.llm.arch.get("num_hidden_layers")
    if language.enabled and depth is not None:
        pruned_layers(language, depth)


def check_feature_cache(config: Config, name: str) -> None:
    """Raise UserError where the visual tokens that stage 1 keeps change while stage `name` trains."""
    stage, vision = config.stage[name], config.pruner.vision
    key, off = "trainer.feature_cache=true", "set trainer.feature_cache=false"
    if stage.train_vision:
        raise UserError(f"{key}: stage.{name}.train_vision=true changes the features that would be kept; {off}")
    for where, score in stage_one_scores(vision):
        if score.draws:
            raise UserError(f"{key}: {where}={score.name} must draw anew each time; {off}")
        if "question" in score.reads:
            raise UserError(f"{key}: {where}={score.name} cuts an image anew for each question; {off}")
        if score.weights and stage.train_scorer:
            raise UserError(
                f"{key}: stage.{name}.train_scorer=true changes which visual tokens {where}={score.name} keeps; {off}"
            )
    if reads_words(vision):
        raise UserError(
            f"{key}: pruner.vision.selection={vision.selection} cuts an image anew for each question; {off}"
        )
    schedule = config.pruner.schedule
    if vision.enabled and schedule.name != "constant" and "vision" in schedule.applies_to:
        raise UserError(
            f"{key}: pruner.schedule.name={schedule.name} changes from step to step which visual tokens "
            f"stage 1 keeps; {off}, or pruner.schedule.applies_to=[language]"
        )
    if merges_projected(vision):
        raise UserError(
            f"{key}: pruner.vision.merge_space=projected merges what the projector makes of the patches, and the cache "
            f"keeps what comes before it; {off}, or pruner.vision.merge_space=features"
        )
    if projects(vision) and stage.train_projector:
        by_space = vision.space == "projected"
        culprit = "space=projected" if by_space else f"selection={vision.selection}"
        raise UserError(
            f"{key}: pruner.vision.{culprit} selects by what the projector, which stage.{name} trains, makes of the "
            f"patches; {off}, or {'pruner.vision.space=features' if by_space else 'choose another selection'}"
        )


def check_calibrated(pruner: PrunerConfig) -> None:
    """Raise UserError where stage 1 does not say what it keeps for which count."""
    vision = pruner.vision
    if reads_text(vision) or (vision.enabled and vision.recover.enabled):
        raise UserError(
            f"task=calibrate measures one curve an image, and pruner={pruner.name} reads questions or keeps patches in "
            "two passes; choose a pruner that does neither"
        )
    for key, part, _ in running(pruner):
        if key.startswith("pruner.vision.") and not _calibratable(part):
            raise UserError(
                f"{key}={part.name}: task=calibrate does not know what it keeps for which parameter; choose another, "
                "declare that (docs/add_a_pruner.md), or see what yours keeps in the keep_ratio of task=evaluate"
            )


def _calibratable(part: Component) -> bool:
    if part.kind == "merge":
        return part.makes is not None
    return part.kind == "vision_score" or (part.declared and not (part.kind == "budget" and "features" in part.reads))
