"""The pruner's settings: what its parts need, and which go together. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from mmprune_train.components.declare import KEYS, Component
from mmprune_train.components.registry import declared, find, library
from mmprune_train.config.knee import arguments_of, budget_of, check_knee, own_budgets
from mmprune_train.config.pruner_schema import (
    LanguageStageConfig,
    PrunerConfig,
    ScheduleConfig,
    VisionStageConfig,
)
from mmprune_train.config.pruner_vision import merges_projected
from mmprune_train.config.ranges import check_values
from mmprune_train.config.tree import leaves
from mmprune_train.errors import UserError


def components(settings: PrunerConfig | VisionStageConfig | Mapping[str, Any], key: str = "pruner") -> dict[str, str]:
    """The user's own parts that settings name, by their dotted keys: code that runs where they are used.

    Args:
        key: of the settings.
    """
    tree = settings if isinstance(settings, Mapping) else asdict(settings)
    return {
        name: value
        for name, value in leaves(tree, key)
        if isinstance(value, str) and ":" in value and name != "pruner.name" and "args." not in name
    }


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


def running(pruner: PrunerConfig) -> Iterator[tuple[str, Component, dict[str, Any]]]:
    """The components that a pruner runs: key, component and the parameters that are given."""
    vision, language = pruner.vision, pruner.language
    parts: list[tuple[str, str, dict[str, Any]]] = []
    if vision.enabled:
        parts = [("pruner.vision.score", vision.score, vision.score_args)]
        parts.append(("pruner.vision.selection", vision.selection, vision.selection_args))
        parts.append(("pruner.vision.merge", vision.merge, vision.merge_args))
        if vision.recover.enabled:
            parts.append(("pruner.vision.recover.score", vision.recover.score, vision.recover.score_args))
    if language.enabled:
        parts.append(("pruner.language.score", language.score, language.score_args))
        parts.append(("pruner.language.selection", language.selection, language.selection_args))
        parts.append(("pruner.language.merge", language.merge, language.merge_args))
    for key, name, given in parts:
        if name != "none":
            component = find(KEYS[key], name, key)
            yield key, component, component.arguments(f"{key}_args", given)
    for key, knee in own_budgets(pruner):
        component = budget_of(knee, key)
        yield f"{key}.method", component, arguments_of(knee, component, key)


def places(pruner: PrunerConfig, stage: str = "pruner") -> list[str]:
    """`module:function` of each component that a pruner runs, of one of its stages where that is named."""
    return sorted({part.place for key, part, _ in running(pruner) if key.startswith(f"{stage}.")})


def check_own_components(pruner: PrunerConfig) -> None:
    """Raise UserError where functions of the user's own that this command names do not take their parameters. Their
    source is read, nothing is imported."""
    for _ in running(pruner):
        pass


def check_pruner(pruner: PrunerConfig) -> None:
    """Raise UserError for settings that cannot work. Parameters of the user's own functions are left out: settings that
    were saved with a model do not become unreadable with them."""
    check_values(pruner, "pruner.")
    _check_vision_stage(pruner.vision)
    _check_language_stage(pruner.language)
    _check_schedule(pruner.schedule, pruner)


def _check_part(key: str, name: str, given: dict[str, Any]) -> None:
    if name == "none" and KEYS[key].endswith("merge"):
        if given:
            raise UserError(f"{key}_args={given} is for a merge, and {key}=none; choose one, or leave them out")
    elif not (component := find(KEYS[key], name, key)).own:
        component.arguments(f"{key}_args", given)


def _check_language_stage(stage: LanguageStageConfig) -> None:
    key = "pruner.language"
    _check_part(f"{key}.score", stage.score, stage.score_args)
    _check_part(f"{key}.selection", stage.selection, stage.selection_args)
    _check_part(f"{key}.merge", stage.merge, stage.merge_args)
    check_knee(f"{key}.knee", stage.knee)
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
    if not stage.enabled:
        return
    _check_budget(key, stage.knee, stage.score)
    _check_per_layer(f"{key}.per_layer_budgets", stage)
    score = find("language_score", stage.score, f"{key}.score")
    if stage.query_tokens == "relevant" and "query_tokens" not in score.reads:
        able = next(one.name for one in library()["language_score"].values() if "query_tokens" in one.reads)
        raise UserError(
            f"{key}.query_tokens=relevant: {key}.score={stage.score} has no query tokens; set {key}.query_tokens=all, "
            f"or {key}.score={able}"
        )


def _check_per_layer(key: str, stage: LanguageStageConfig) -> None:
    budgets = stage.per_layer_budgets
    if budgets is None:
        return
    component = budget_of(stage.knee, "pruner.language.knee")
    if not component.fixed:
        fixed = [one.name for one in declared()["budget"].values() if one.fixed]
        raise UserError(
            f"{key}={budgets} goes with a fixed budget, not with {stage.knee.method}: set "
            f"pruner.language.knee.method={' or '.join(fixed)}, or {key}=null"
        )
    if len(budgets) != len(_listed(stage.layer)):
        raise UserError(f"{key}={budgets} needs one entry for each of pruner.language.layer={stage.layer}")
    parameter = component.parameter(component.fixed)
    assert parameter is not None
    for value in budgets:
        parameter.take(key, value)


def _listed(layer: Any) -> list[Any]:
    return list(layer) if isinstance(layer, list | tuple) else [layer]


def _is_layer(layer: Any) -> bool:
    if isinstance(layer, float):
        return 0 < layer < 1
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def pruned_layers(stage: LanguageStageConfig, depth: int) -> dict[int, int]:
    """LLM layers that stage 2 prunes before, ascending, each with its place in `layer` and `per_layer_budgets`.

    A share of the depth is rounded down, to a layer that has something to look at. Shares that meet in one layer of a
    shallow LLM prune once, as the last of them.

    Args:
        depth: layers of the LLM.
    Raises:
        UserError: a layer that the LLM does not have, layers that do not rise, nothing before the first layer to look
            at.
    """
    listed = _listed(stage.layer)
    first = int(stage.score_layer == "previous")
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
            "pruner.language.score_layer=previous: no layer comes before pruner.language.layer=0; set it to 1 or more, "
            "or pruner.language.score_layer=current"
        )
    return {layer: place for place, layer in enumerate(layers)}


def _check_vision_stage(stage: VisionStageConfig) -> None:
    key = "pruner.vision"
    for name, layer in ((f"{key}.layer", stage.layer), (f"{key}.recover.layer", stage.recover.layer)):
        if layer is not None and not (type(layer) is int or _is_layer(layer)):
            raise UserError(
                f"{name}={layer} must be a block's index (from 0, or negative from the end), a share of the depth "
                "(between 0 and 1), or null"
            )
    _check_part(f"{key}.score", stage.score, stage.score_args)
    _check_part(f"{key}.selection", stage.selection, stage.selection_args)
    _check_part(f"{key}.merge", stage.merge, stage.merge_args)
    check_knee(f"{key}.knee", stage.knee)
    _check_part(f"{key}.recover.score", stage.recover.score, stage.recover.score_args)
    check_knee(f"{key}.recover.knee", stage.recover.knee, least=0)
    if not stage.enabled:
        return
    _check_budget(key, stage.knee, stage.score)
    if stage.recover.enabled:
        _check_budget(f"{key}.recover", stage.recover.knee, stage.recover.score)
        if find("vision_score", stage.recover.score, f"{key}.recover.score").weights:
            raise UserError(
                f"{key}.recover.score={stage.recover.score} has weights, which the first pass alone trains: set "
                f"{key}.score={stage.recover.score}, and another {key}.recover.score"
            )
    _check_target(stage)
    if merges_projected(stage) and stage.keep_cls:
        raise UserError(
            f"{key}.keep_cls=true puts CLS among what enters the projector, and {key}.merge_space=projected merges "
            f"behind it: set {key}.merge_space=features, or {key}.keep_cls=false"
        )
    parts = [("selection", stage.selection), ("merge", stage.merge)]
    weighing = [(kind, name) for kind, name in parts if name != "none" and find(kind, name, f"{key}.{kind}").weighs]
    if weighing and find("vision_score", stage.score, f"{key}.score").signed:
        kind, name = weighing[0]
        raise UserError(
            f"{key}.{kind}={name} weighs patches by score, and {key}.score={stage.score} can be negative: "
            f"set {key}.score={_unsigned('vision_score')}, or another {key}.{kind}"
        )
    if "" in stage.question_ends:
        raise UserError(f"{key}.question_ends holds an empty text, which would end every question: leave it out")
    moved = f"order={stage.order}" if stage.order != "raster" else "keep_cls=true" if stage.keep_cls else ""
    if moved and stage.positions == "original":
        raise UserError(
            f"{key}.{moved} moves patches, so {key}.positions=original would give them each other's places: "
            f"set {key}.positions=contiguous, or {key}.order=raster and {key}.keep_cls=false"
        )


def _check_target(stage: VisionStageConfig) -> None:
    key = f"pruner.vision.target={stage.target}"
    if stage.target is None:
        return
    if not find("vision_score", stage.score, "pruner.vision.score").weights:
        able = [one.name for one in declared()["vision_score"].values() if one.weights]
        raise UserError(
            f"{key} is for a score that is trained, and pruner.vision.score={stage.score} is none: set it to "
            f"{' or '.join(able)}, or pruner.vision.target=null"
        )
    if not budget_of(stage.knee, "pruner.vision.knee").positive:
        able = [one.name for one in declared()["budget"].values() if one.positive]
        raise UserError(
            f"{key} goes with a budget that keeps the scores above 0: set "
            f"pruner.vision.knee.method={' or '.join(able)}, or pruner.vision.target=null"
        )


def _unsigned(kind: str) -> str:
    return next(one.name for one in library()[kind].values() if not one.signed)


def _check_budget(key: str, knee: Any, name: str) -> None:
    kind, budget, told = KEYS[f"{key}.score"], budget_of(knee, f"{key}.knee"), f"{key}.knee.method={knee.method}"
    score = find(kind, name, f"{key}.score")
    if budget.divides_sum and score.signed:
        raise UserError(
            f"{told} needs scores >= 0, and {key}.score={name} can be negative: "
            f"set {key}.score={_unsigned(kind)}, or another {key}.knee.method"
        )
    if budget.positive and not (score.weights or score.own or score.package):
        able = [one.name for one in declared()[kind].values() if one.weights and key == "pruner.vision"]
        raise UserError(
            f"{told} keeps scores above 0, so it is for scores that are trained, and {key}.score={name} is not: set "
            f"{f'{key}.score=' + ' or '.join(able) + ', or ' if able else ''}another {key}.knee.method"
        )


def _check_schedule(schedule: ScheduleConfig, pruner: PrunerConfig) -> None:
    key = "pruner.schedule"
    if schedule.start >= schedule.end:
        raise UserError(f"{key}.start={schedule.start} must be less than {key}.end={schedule.end}")
    if schedule.low > schedule.high:
        raise UserError(f"{key}.low={schedule.low} must be at most {key}.high={schedule.high}")
    if schedule.name != "constant" and not any(getattr(pruner, name).enabled for name in schedule.applies_to):
        on = [name for name in ("vision", "language") if getattr(pruner, name).enabled]
        raise UserError(
            f"{key}.name={schedule.name} moves nothing: pruner={pruner.name} runs no stage that "
            f"{key}.applies_to=[{','.join(schedule.applies_to)}] names; set "
            + (f"{key}.applies_to=[{','.join(on)}]" if on else f"{key}.name=constant, or choose another pruner")
        )
