"""A pruner brought to a budget: to a share of the visual tokens that enter an LLM layer, averaged over layers.

As `task=calibrate` does it, stage 1's budget is solved for with stage 2 in the loop, or stage 2's where that runs
alone; here on questions that are asked, of which tokens alone are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mmprune_train.config.knee import budget_of, with_value
from mmprune_train.config.pruner_schema import SHORTS, KneeConfig, PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.pruning.calibration import Searched, Value, searched, solve

QUESTIONS = 64
"""That tokens are counted on. Our choice."""


@dataclass(frozen=True)
class Brought:
    pruner: PrunerConfig
    setting: str
    """What was set, as it is typed: `pruner.vision.knee.ratio=0.2`."""
    target: float
    reached: float
    """On the questions that were looked at."""


def prunes(pruner: PrunerConfig) -> bool:
    """Whether any stage of it is on."""
    return pruner.vision.enabled or pruner.language.enabled


def bring(
    pruner: PrunerConfig, target: float, share: Callable[[PrunerConfig], float], patches: int, key: str
) -> Brought:
    """The pruner with the parameter of its budget that comes nearest to a share.

    Args:
        share: of the visual tokens, under a pruner.
        patches: visual tokens of an image.
        key: that asks for it, for the message.
    Raises:
        UserError: its budget has no parameter, or none that meets the share.
    """
    stage = "vision" if pruner.vision.enabled else "language"
    part = getattr(pruner, stage)
    layers = part.per_layer_budgets if stage == "language" else None
    parameter = _factor(part.knee, layers, patches) if layers else searched(part.knee, patches)
    if parameter is None:
        raise UserError(
            f"{key}: pruner {pruner.name} cannot be brought to {target:.3g}, its {part.knee.method} has no parameter "
            "to solve for; give it another knee, or leave it out"
        )

    def at(value: Value) -> PrunerConfig:
        if layers:
            return replace(pruner, language=replace(part, per_layer_budgets=_scaled(part.knee, layers, value)))
        return replace(pruner, **{stage: replace(part, knee=with_value(part.knee, parameter.name, value))})

    token = 1 / patches
    found = solve(lambda value: share(at(value)), parameter, target, token, token / 4, scan=5)
    if found.value is None or found.reached is None:
        low, high = found.reachable
        raise UserError(
            f"{key}: pruner {pruner.name} keeps {low:.3g} to {high:.3g} of the visual tokens, averaged over layers, "
            f"whatever its {parameter.name} ({found.problem}), not {target:.3g}; give another budget, or another knee"
        )
    made = at(found.value)
    if layers:
        setting = f"pruner.language.per_layer_budgets={made.language.per_layer_budgets}".replace(" ", "")
    else:
        name = parameter.name if parameter.name in SHORTS else f"args.{parameter.name}"
        setting = f"pruner.{stage}.knee.{name}={found.value}"
    return Brought(made, setting, target, found.reached)


def _factor(knee: KneeConfig, layers: list[float], patches: int) -> Searched:
    """What the budgets of the layers are all multiplied by: from next to nothing to where each keeps everything."""
    most = patches if _counts(knee) else 1.0
    return Searched("per_layer_budgets", 1 / (2 * patches), most / min(layers))


def _scaled(knee: KneeConfig, layers: list[float], factor: Value) -> list[float]:
    if _counts(knee):
        return [max(1, round(budget * factor)) for budget in layers]
    return [min(1.0, float(f"{budget * factor:.4g}")) for budget in layers]


def _counts(knee: KneeConfig) -> bool:
    """Whether the budgets of layers are numbers of tokens, not shares."""
    component = budget_of(knee)
    parameter = component.parameter(component.fixed)
    assert parameter is not None
    return parameter.type == "int"
