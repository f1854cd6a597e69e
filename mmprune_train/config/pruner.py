"""The pruner's settings: the names of its parts, what each needs, and which go together. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from mmprune_train.config.pruner_schema import (
    KneeConfig,
    LanguageStageConfig,
    PrunerConfig,
    RecoverConfig,
    ScheduleConfig,
    VisionStageConfig,
)
from mmprune_train.config.ranges import check_values
from mmprune_train.config.schema import EncoderConfig
from mmprune_train.config.values import at_least, component, one_of
from mmprune_train.errors import UserError

KNEE_METHODS = (
    "kneedle", "max_chord", "l_method", "menger", "second_difference", "otsu", "iqr", "lof",
    "cumulative_mass", "attention_entropy", "effective_rank", "fixed_ratio", "fixed_count",
)  # fmt: skip
SHARE_METHODS = ("cumulative_mass", "attention_entropy")
"""Budgets that share out the sum of the scores, which must not be negative."""
TEXT_SCORES = ("text_similarity", "text_similarity_bare", "text_dissimilarity")
"""Stage-1 scores that read the question."""
SIGNED_SCORES = ("cls_cosine", "pooled_cosine", *TEXT_SCORES, "text_cosine", "key_norm")
"""Scores that can be negative."""
VISION_SCORES = (
    *("cls_attention", "cls_attention_wide", "cls_cosine", "map_attention"),
    *("pooled_cosine", "feature_norm", *TEXT_SCORES, "uniform_grid", "random"),
)
SCORE_NEEDS = {
    "cls_attention": "a CLS token",
    "cls_attention_wide": "a CLS token",
    "cls_cosine": "a CLS token",
    "map_attention": "an attention pooling head",
    **dict.fromkeys(TEXT_SCORES, "a CLIP text tower"),
}
LANGUAGE_SCORES = ("text_attention", "text_cosine", "last_token_attention", "key_norm", "random")
RATED_SCORES = ("text_attention", "text_cosine")
"""Stage-2 scores in which question text votes."""
TURNS = ("first", "mean", "max")
DIVERSE_SELECTIONS = ("max_min", "dpp", "top_and_distinct")
"""Selections that look at the features."""
SELECTIONS = ("top", "max_min", "dpp", "top_and_uniform", "top_and_distinct")
MERGES = ("none", "nearest", "mean_token", "prumerge", "contextual", "centres")
WEIGHING_MERGES = ("prumerge", "centres")
"""Merges that weigh patches by their scores, which must not be negative."""
PRUNING_STAGES = ("vision", "language")
POSITIONS = ("contiguous", "original")


def components(settings: PrunerConfig | VisionStageConfig | Mapping[str, Any], key: str = "pruner") -> dict[str, str]:
    """The user's own parts that settings name, by their dotted keys: code that runs where they are used.

    Args:
        key: of the settings.
    """
    tree = settings if isinstance(settings, Mapping) else asdict(settings)
    return {name: value for name, value in _texts(tree, key) if ":" in value and name != "pruner.name"}


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _texts(value, f"{key}.{name}")
    elif isinstance(tree, str):
        yield key, tree


def refuse_foreign(where: object, found: Mapping[str, str], named: Mapping[str, str]) -> None:
    """Raise UserError for a component that settings of somebody else's name, and the user does not.

    Args:
        where: the file of the settings.
        found: their components.
        named: those of the user's own settings.
    """
    for key, name in found.items():
        if named.get(key) != name:
            raise UserError(
                f"{where} names {key}={name}, and code that a folder names is not run unasked: where you trust it, "
                "give trust_components=true (load_model(..., trust_components=True))"
            )


def check_knee(key: str, knee: KneeConfig, least: int = 1) -> None:
    """`key` is the dotted name of this budget, for the messages; `least` the smallest `min_tokens` it may have."""
    component(f"{key}.method", knee.method, KNEE_METHODS)
    one_of(f"{key}.no_knee", knee.no_knee, ("keep_all", "max_chord"))
    at_least(f"{key}.min_tokens", knee.min_tokens, least)
    if knee.max_tokens is not None and knee.max_tokens < knee.min_tokens:
        raise UserError(
            f"{key}.max_tokens={knee.max_tokens} is less than {key}.min_tokens={knee.min_tokens}: raise it, or set null"
        )


def check_pruner(pruner: PrunerConfig) -> None:
    check_values(pruner, "pruner.")
    _check_vision_stage(pruner.vision)
    _check_language_stage(pruner.language)
    _check_schedule(pruner.schedule, pruner)


def _check_language_stage(stage: LanguageStageConfig) -> None:
    key = "pruner.language"
    component(f"{key}.score", stage.score, LANGUAGE_SCORES)
    one_of(f"{key}.signal", stage.signal, ("next", "previous"))
    one_of(f"{key}.turns", stage.turns, TURNS)
    one_of(f"{key}.raters", stage.raters, ("all", "relevant"))
    one_of(f"{key}.candidates", stage.candidates, ("visual_and_text", "visual"))
    one_of(f"{key}.ranking", stage.ranking, ("per_kind", "joint"))
    one_of(f"{key}.no_text", stage.no_text, ("keep_all", "last_token_attention"))
    one_of(f"{key}.merge", stage.merge, ("none", "recycle"))
    one_of(f"{key}.positions", stage.positions, POSITIONS)
    check_knee(f"{key}.knee", stage.knee)
    _check_shares(key, stage, "text_attention")
    layers = _listed(stage.layer)
    if not layers or not all(map(_is_layer, layers)):
        raise UserError(
            f"{key}.layer={stage.layer} must be a layer index (from 0), a share of the depth (between 0 and 1), or a "
            "list of them, [2,8] or [0.25,0.5]"
        )
    for kind in (int, float):
        same = [layer for layer in layers if isinstance(layer, kind)]
        if same != sorted(set(same)):
            raise UserError(f"{key}.layer={stage.layer} must rise: every layer sees a shorter sequence")
    if stage.enabled:
        _check_amounts(f"{key}.amounts", stage)
        if stage.raters == "relevant" and ":" not in stage.score and stage.score not in RATED_SCORES:
            raise UserError(
                f"{key}.raters=relevant: no question text votes in {key}.score={stage.score}; set {key}.raters=all, or "
                f"{key}.score={RATED_SCORES[0]}"
            )


def _check_amounts(key: str, stage: LanguageStageConfig) -> None:
    amounts, method = stage.amounts, stage.knee.method
    if amounts is None:
        return
    if method not in ("fixed_ratio", "fixed_count"):
        raise UserError(
            f"{key}={amounts} goes with a fixed budget, not with {method}: set pruner.language.knee.method=fixed_ratio "
            f"or fixed_count, or {key}=null"
        )
    if len(amounts) != len(_listed(stage.layer)):
        raise UserError(f"{key}={amounts} needs one entry for each of pruner.language.layer={stage.layer}")
    for amount in amounts:
        if method == "fixed_ratio" and not 0 < amount <= 1:
            raise UserError(f"{key}={amounts}: shares of the tokens are more than 0 and at most 1")
        if method == "fixed_count" and not (amount >= 1 and float(amount).is_integer()):
            raise UserError(f"{key}={amounts}: counts of tokens are whole numbers from 1")


def _listed(layer: Any) -> list[Any]:
    return list(layer) if isinstance(layer, list | tuple) else [layer]


def _is_layer(layer: Any) -> bool:
    if isinstance(layer, float):
        return 0 < layer < 1
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def pruned_layers(stage: LanguageStageConfig, depth: int) -> dict[int, int]:
    """LLM layers that stage 2 prunes before, ascending, each with its place in `layer` and `amounts`.

    A share of the depth is rounded down, to a layer that has something to look at. Shares that meet in one layer of a
    shallow LLM prune once, as the last of them.

    Args:
        depth: layers of the LLM.
    Raises:
        UserError: a layer that the LLM has not, layers that do not rise, nothing before the first layer to look at.
    """
    listed = _listed(stage.layer)
    first = int(stage.signal == "previous")
    layers = [max(first, int(layer * depth + 1e-9)) if isinstance(layer, float) else layer for layer in listed]
    if layers != sorted(layers):
        raise UserError(f"pruner.language.layer={stage.layer} must rise, and in {depth} layers they are {layers}")
    if layers[-1] >= depth:
        raise UserError(
            f"pruner.language.layer={layers[-1]}: this LLM has {depth} layers, 0..{depth - 1}; shares of the "
            "depth (0.25) fit any"
        )
    if layers[0] < first:
        raise UserError(
            "pruner.language.signal=previous: no layer comes before pruner.language.layer=0; set it to 1 or more, or "
            "pruner.language.signal=next"
        )
    return {layer: place for place, layer in enumerate(layers)}


def idle_knee(pruner: PrunerConfig, knee: KneeConfig) -> str | None:
    """What to tell who chooses a `knee` that no budget of the pruner follows; None: one does, or there is no budget."""
    stages = {
        key: stage.knee for key, stage in (("vision", pruner.vision), ("language", pruner.language)) if stage.enabled
    }
    if not stages or knee in stages.values():
        return None
    keys = " or ".join(f"pruner.{key}.knee.method" for key in stages)
    return f"knee={knee.method} moves nothing: pruner={pruner.name} sets its own budgets; {keys} does"


def idle_budgets(pruner: PrunerConfig, patches: int) -> str | None:
    """What to tell of budgets that drop nothing of an image, in one line; None: all drop something, or may.

    Args:
        patches: of an image of the encoder.
    """
    vision, language, schedule = pruner.vision, pruner.language, pruner.schedule
    whole = []
    drawn = schedule.applies_to if schedule.name == "random" else []
    if vision.enabled and "vision" not in drawn:
        whole += _keeps_all("pruner.vision.knee", vision.knee, patches)
        if vision.recover.enabled and not whole:
            whole += _keeps_all("pruner.vision.recover.knee", vision.recover.knee, patches)
    if language.enabled and "language" not in drawn:
        key = "pruner.language"
        if language.min_per_image >= patches:
            whole.append(f"{key}.min_per_image={language.min_per_image}")
        elif language.amounts is None:
            whole += _keeps_all(f"{key}.knee", language.knee, patches)
        elif all(_keeps_all("", with_amount(language.knee, amount), patches) for amount in language.amounts):
            whole.append(f"{key}.amounts={language.amounts}")
    if not whole:
        return None
    return f"{' and '.join(whole)}: nothing is dropped of an image, which has {patches} patches on this encoder"


def _keeps_all(key: str, knee: KneeConfig, size: int) -> list[str]:
    """The setting, as `key=value`, by which a budget keeps any row of that size whole."""
    if knee.max_tokens is not None and knee.max_tokens < size:
        return []
    if knee.min_tokens >= size:
        return [f"{key}.min_tokens={knee.min_tokens}"]
    whole = {
        "fixed_count": ("count", knee.count >= size),
        "fixed_ratio": ("ratio", math.floor(knee.ratio * size + 0.5) >= size),
        "cumulative_mass": ("mass", knee.mass == 1),
    }
    name, keeps = whole.get(knee.method, ("", False))
    return [f"{key}.{name}={getattr(knee, name)}"] if keeps else []


def with_amount(knee: KneeConfig, amount: float) -> KneeConfig:
    """The budget with one of `amounts`."""
    return replace(knee, ratio=amount) if knee.method == "fixed_ratio" else replace(knee, count=int(amount))


def projects(stage: VisionStageConfig) -> bool:
    """Whether stage 1 selects by what the projector makes of all patches; a selection of the user's may."""
    looks = stage.selection in DIVERSE_SELECTIONS or ":" in stage.selection
    return stage.enabled and stage.space == "projected" and looks


def _check_vision_stage(stage: VisionStageConfig) -> None:
    key = "pruner.vision"
    component(f"{key}.score", stage.score, VISION_SCORES)
    component(f"{key}.selection", stage.selection, SELECTIONS)
    one_of(f"{key}.space", stage.space, ("features", "projected"))
    component(f"{key}.merge", stage.merge, MERGES)
    one_of(f"{key}.order", stage.order, ("raster", "rank"))
    one_of(f"{key}.positions", stage.positions, POSITIONS)
    check_knee(f"{key}.knee", stage.knee)
    _check_shares(key, stage, "cls_attention")
    component(f"{key}.recover.score", stage.recover.score, VISION_SCORES)
    check_knee(f"{key}.recover.knee", stage.recover.knee, least=0)
    if not stage.enabled:
        return
    _check_shares(f"{key}.recover", stage.recover, "cls_attention")
    if stage.merge in WEIGHING_MERGES and stage.score in SIGNED_SCORES:
        raise UserError(
            f"{key}.merge={stage.merge} weighs patches by score, and {key}.score={stage.score} can be negative: "
            f"set {key}.score=cls_attention_wide, or another {key}.merge"
        )
    if stage.order == "rank" and stage.positions == "original":
        raise UserError(
            f"{key}.order=rank moves patches, so {key}.positions=original would give them each other's places: "
            f"set {key}.positions=contiguous, or {key}.order=raster"
        )


def reads_text(stage: VisionStageConfig) -> bool:
    """Whether stage 1 reads the question, so that an image is cut anew for each."""
    return any(score in TEXT_SCORES for _, score in stage_one_scores(stage))


def stage_one_scores(stage: VisionStageConfig) -> list[tuple[str, str]]:
    """(key, score) of each pass of stage 1 over the patches; empty where it is off."""
    passes = [("pruner.vision.score", stage.score)] if stage.enabled else []
    return passes + ([("pruner.vision.recover.score", stage.recover.score)] if passes and stage.recover.enabled else [])


def _check_shares(key: str, stage: VisionStageConfig | LanguageStageConfig | RecoverConfig, softmaxed: str) -> None:
    if stage.enabled and stage.knee.method in SHARE_METHODS and stage.score in SIGNED_SCORES:
        raise UserError(
            f"{key}.knee.method={stage.knee.method} needs scores >= 0, and {key}.score={stage.score} can be negative: "
            f"set {key}.score={softmaxed}, or another {key}.knee.method"
        )


def _check_schedule(schedule: ScheduleConfig, pruner: PrunerConfig) -> None:
    key = "pruner.schedule"
    one_of(f"{key}.name", schedule.name, ("constant", "anneal", "random"))
    one_of(f"{key}.shape", schedule.shape, ("cosine", "linear"))
    for name in schedule.applies_to:
        one_of(f"{key}.applies_to", name, PRUNING_STAGES)
    if schedule.start >= schedule.end:
        raise UserError(f"{key}.start={schedule.start} must be less than {key}.end={schedule.end}")
    if schedule.low > schedule.high:
        raise UserError(f"{key}.low={schedule.low} must be at most {key}.high={schedule.high}")
    if schedule.name != "constant" and not any(getattr(pruner, name).enabled for name in schedule.applies_to):
        on = [name for name in PRUNING_STAGES if getattr(pruner, name).enabled]
        raise UserError(
            f"{key}.name={schedule.name} moves nothing: pruner={pruner.name} runs no stage that "
            f"{key}.applies_to=[{','.join(schedule.applies_to)}] names; set "
            + (f"{key}.applies_to=[{','.join(on)}]" if on else f"{key}.name=constant, or choose another pruner")
        )


def possible_scores(encoder: EncoderConfig) -> list[str]:
    """Stage-1 scores that an encoder can give. The pooling head is SigLIP's, unless it is built without."""
    arch = encoder.arch
    pools = arch.get("model_type") == "siglip_vision_model" and arch.get("vision_use_head", True)
    has = {
        "a CLS token": encoder.has_cls,
        "an attention pooling head": pools,
        "a CLIP text tower": encoder.text is not None,
    }
    return [score for score in VISION_SCORES if score not in SCORE_NEEDS or has[SCORE_NEEDS[score]]]
