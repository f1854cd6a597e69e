"""A budget's settings: its method with that method's own parameters. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mmprune_train.components.declare import Component
from mmprune_train.components.registry import find, library
from mmprune_train.config.pruner_schema import SHORTS, KneeConfig, PrunerConfig
from mmprune_train.errors import UserError


def budget_of(knee: KneeConfig, key: str = "knee") -> Component:
    """The budget that a `knee` names; `key` is the dotted name of this knee, for the messages."""
    return find("budget", knee.method, f"{key}.method")


def arguments_of(knee: KneeConfig, component: Component, key: str = "knee") -> dict[str, Any]:
    """Parameters that a budget is given: by `args`, and by the short keys of those that it has.

    Raises:
        UserError: a parameter is given twice, or is not one that the budget takes.
    """
    given, keys = dict(knee.args), {}
    for name in SHORTS:
        value = getattr(knee, name)
        if value is None or component.parameter(name) is None:
            continue
        if given.setdefault(name, value) != value:
            raise UserError(
                f"{key}.{name}={value} and {key}.args.{name}={given[name]} are the same parameter; give one of them"
            )
        keys[name] = f"{key}.{name}"
    return component.arguments(f"{key}.args", given, keys)


def with_value(knee: KneeConfig, name: str, value: Any) -> KneeConfig:
    """The budget with this value of one of its parameters."""
    changed: dict[str, Any] = {name: value}
    if name in SHORTS:
        return replace(knee, args={key: held for key, held in knee.args.items() if key != name}, **changed)
    return replace(knee, args={**knee.args, name: value})


def with_method(knee: KneeConfig, method: str) -> KneeConfig:
    """Another method within the same bounds; parameters by name are the former method's own."""
    return knee if knee.method == method else replace(knee, method=method, args={})


def check_knee(key: str, knee: KneeConfig, least: int = 1) -> None:
    """`key` is the dotted name of this budget, for the messages; `least` the smallest `min_tokens` it may have."""
    component = budget_of(knee, key)
    if not component.own:
        arguments_of(knee, component, key)
    for name in SHORTS:
        if (value := getattr(knee, name)) is not None:
            declared = next(found for one in library()["budget"].values() if (found := one.parameter(name)))
            declared.take(f"{key}.{name}", value)
    if knee.min_tokens < least:
        raise UserError(f"{key}.min_tokens={knee.min_tokens} must be at least {least}")
    if knee.max_tokens is not None and knee.max_tokens < knee.min_tokens:
        raise UserError(
            f"{key}.max_tokens={knee.max_tokens} is less than {key}.min_tokens={knee.min_tokens}: raise it, or set null"
        )


def follow_group(pruner: PrunerConfig, knee: KneeConfig) -> None:
    """Give the budgets that follow the `knee` group's method the group's `args`, below their own."""
    for stage in (pruner.vision, pruner.vision.recover, pruner.language):
        if stage.knee.method == knee.method:
            stage.knee.args = {**knee.args, **stage.knee.args}


def keeps_whole(key: str, knee: KneeConfig, size: int) -> list[str]:
    """The setting, as `key=value`, by which a budget keeps any row of that size whole."""
    if knee.max_tokens is not None and knee.max_tokens < size:
        return []
    if knee.min_tokens >= size:
        return [f"{key}.min_tokens={knee.min_tokens}"]
    component = budget_of(knee, key)
    if component.whole is None:
        return []
    name, keeps = component.whole
    value = component.value(name, arguments_of(knee, component, key))
    where = f"{key}.{name}" if name in SHORTS and name not in knee.args else f"{key}.args.{name}"
    return [f"{where}={value}"] if keeps(value, size) else []


def per_layer(knee: KneeConfig, budgets: list[float] | None) -> Iterator[KneeConfig]:
    """The budget of each pruning layer: with one of `per_layer_budgets` for its fixed parameter, or as it is."""
    if budgets is None:
        yield knee
    for value in budgets or ():
        yield with_value(knee, budget_of(knee).fixed, value)


def own_budgets(pruner: PrunerConfig) -> Iterator[tuple[str, KneeConfig]]:
    """The budgets that a pruner runs, by their keys."""
    if pruner.vision.enabled:
        yield "pruner.vision.knee", pruner.vision.knee
        if pruner.vision.recover.enabled:
            yield "pruner.vision.recover.knee", pruner.vision.recover.knee
    if pruner.language.enabled:
        yield "pruner.language.knee", pruner.language.knee
