"""What the components of a pruner are given, defaults filled in: settings that mean the same are the same here.

Plain mappings in and out, as `dataclasses.asdict` makes them and config.yaml holds them. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import Any

from mmprune_train.components.declare import KEYS, REQUIRED, Component
from mmprune_train.components.registry import find
from mmprune_train.components.source import UNREAD
from mmprune_train.config.pruner_schema import SHORTS, PrunerConfig
from mmprune_train.config.renamed import former_settings, upgraded
from mmprune_train.errors import UserError

KNEES = ("knee", "pruner.vision.knee", "pruner.vision.recover.knee", "pruner.language.knee")

OF_WEIGHTS = ("train_scorer", "scorer_lr", "noise", "target", "target_weight")
"""Keys of a training stage, and of `pruner.vision`, that say nothing where no score has weights."""

NONE = "none"
"""A merge that there is not."""


def as_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were saved, in the shape of now. Those of former keys held every parameter of every component, at
    its default where it was not used."""
    new = upgraded(saved)
    return in_effect(new) if former_settings(saved) else new


def in_effect(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which each component has the parameters that it takes, all of them and no others.

    A function of the user's own that cannot be read has what it is given. Keys for scores with weights are left out
    where there is no such score.

    Args:
        settings: of a run, or a mapping with its `pruner` alone.
    """
    new = deepcopy(dict(settings))
    weighted = False
    for section, args, short, component in _components(new):
        weighted |= bool(component.weights) and section.get("enabled") is not False
        given = {name: section[name] for name in short if section.get(name) is not None} | dict(section.get(args) or {})
        if component.readable:
            taken = {one.name: given.get(one.name, one.default) for one in component.parameters}
            given = {name: value for name, value in taken.items() if value not in (REQUIRED, UNREAD)}
        section |= {name: given.pop(name, None) for name in short}
        section[args] = given
    if not weighted:
        stages, pruner = new.get("stage"), new.get("pruner")
        for stage in stages.values() if isinstance(stages, dict) else ():
            _without(stage, OF_WEIGHTS)
        _without(pruner.get("vision") if isinstance(pruner, dict) else None, OF_WEIGHTS)
    return new


def _without(section: Any, keys: tuple[str, ...]) -> None:
    for key in keys if isinstance(section, dict) else ():
        section.pop(key, None)


def same_pruner(one: PrunerConfig, other: PrunerConfig) -> bool:
    """Whether two pruners do the same under the same name."""
    return in_effect({"pruner": asdict(one)}) == in_effect({"pruner": asdict(other)})


def _components(settings: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, tuple[str, ...], Component]]:
    """The section of each component, the name of its arguments there, its parameters with keys of their own, itself."""
    keys = {key: (kind, f"{key.rpartition('.')[2]}_args") for key, kind in KEYS.items() if not key.startswith("knee.")}
    keys |= {f"{key}.method": (KEYS["knee.method"], "args") for key in KNEES}
    for key, (kind, args) in keys.items():
        *path, last = key.split(".")
        section: Any = settings
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        name = section.get(last) if isinstance(section, dict) else None
        if isinstance(name, str) and isinstance(section.get(args) or {}, dict):
            try:
                component = Component("", name=name) if name == NONE else find(kind, name, key)
                yield section, args, SHORTS if args == "args" else (), component
            except UserError:  # told when the settings are checked
                continue
