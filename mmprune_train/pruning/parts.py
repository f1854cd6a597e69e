"""Components as the pruner calls them: imported, their parameters filled in, what others' functions answer checked."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from mmprune_train.components.declare import READS, Component
from mmprune_train.components.registry import declared, find, of_kind
from mmprune_train.components.source import read_imported
from mmprune_train.config.knee import arguments_of
from mmprune_train.config.pruner_schema import KneeConfig
from mmprune_train.errors import UserError, nearest
from mmprune_train.pruning import answers
from mmprune_train.pruning.views import VisionView

CHECKS: dict[str, answers.Check] = {
    "vision_score": answers.vision_scores,
    "language_score": answers.language_scores,
    "budget": answers.counts,
    "selection": answers.selected,
    "merge": answers.merged,
    "language_selection": answers.selected_tokens,
    "language_merge": answers.merged_states,
}


@dataclass(frozen=True)
class Part:
    """A component ready to be called."""

    component: Component
    key: str
    """That names it, e.g. `pruner.vision.score`."""
    function: Callable[..., Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters, without those that are left at their defaults."""

    @property
    def told(self) -> dict[str, Any]:
        """All its parameters, defaults too."""
        return {one.name: one.default for one in self.component.parameters} | dict(self.given)

    def __call__(self, *inputs: Any, **offered: Any) -> Any:
        if self.component.kind == "vision_score":
            self._refuse(inputs[0])
        return self.function(*inputs, **offered)

    def _refuse(self, view: VisionView) -> None:
        """Raise UserError where the encoder cannot give the score."""
        for name in self.component.reads:
            if getattr(view, name) is None:
                raise UserError(
                    f"{self.key}={self.component.name} needs {READS[name]}, which {view.encoder} does not have; set "
                    f"{self.key} to one that it can give: {', '.join(possible_scores(view))}"
                )


def new_weights(part: Part, **widths: int | None) -> nn.Module:
    """The weights that a component declares, as they begin.

    Args:
        widths: of what it will see, by the names that `Declaration.weights` gives.
    Raises:
        UserError: the component's module does not have what makes them, or that makes something else.
    """
    component, told = part.component, f"{part.key}={part.component.name}: weights={part.component.weights!r}"
    module = importlib.import_module(component.place.partition(":")[0])
    make = getattr(module, component.weights, None)
    if not callable(make):
        raise UserError(f"{told} names no class or function of {module.__name__}")
    offered = part.told | widths
    takes = inspect.signature(make).parameters
    made = make(**{name: value for name, value in offered.items() if name in takes})
    if not isinstance(made, nn.Module):
        raise UserError(f"{told} made a {type(made).__name__}, where a torch.nn.Module is wanted")
    return made


def possible_scores(view: VisionView) -> list[str]:
    """Names of the scores that an encoder with this view can give."""
    scores = declared()["vision_score"].values()
    return [one.name for one in scores if all(getattr(view, name) is not None for name in one.reads if READS[name])]


def load_part(kind: str, name: str, key: str, given: Mapping[str, Any] | None = None) -> Part:
    """The component that `key` names, with its parameters.

    Args:
        given: parameters, for messages under `key` with `_args` behind it.
    Raises:
        UserError: no such name; the module cannot be imported or has no such function; parameters that do not fit.
    """
    return _load(kind, name, key, lambda component: component.arguments(f"{key}_args", dict(given or {})))


def load_budget(knee: KneeConfig, key: str) -> Part:
    """The budget that `key`, e.g. `pruner.vision.knee`, holds."""
    return _load("budget", knee.method, f"{key}.method", lambda component: arguments_of(knee, component, key))


def _load(kind: str, name: str, key: str, arguments: Callable[[Component], dict[str, Any]]) -> Part:
    component, function = _imported(kind, name, key)
    given = arguments(component)
    filled: Callable[..., Any] = partial(function, **given)
    if component.own or component.package:
        filled = answers.checked(filled, f"{key}={component.name}", CHECKS[component.kind])
    return Part(component, key, filled, given)


def _imported(kind: str, name: str, key: str) -> tuple[Component, Callable[..., Any]]:
    component = find(kind, name, key)
    module, _, attribute = component.place.partition(":")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module != error.name and not module.startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise UserError(
            f"{key}={name}: there is no module {module}; run from the folder that holds {module.partition('.')[0]}, "
            "or put that folder on PYTHONPATH"
        ) from error
    if (function := getattr(imported, attribute, None)) is None:
        raise UserError(f"{key}={name}: module {module} has no {attribute}{nearest(attribute, vars(imported))}")
    if not callable(function):
        raise UserError(f"{key}={name} is no function but a {type(function).__name__}")
    if component.own:
        component = of_kind(read_imported(function, kind, name), kind, key)
    return component, function
