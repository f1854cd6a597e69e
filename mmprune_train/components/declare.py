"""What a pruning component says of itself: its kind, its parameters, what it reads and what it promises.

A component is a function with one of the decorators below. Its first arguments are what its kind is called with; of the
others those that the kind offers (`known`, `text`, ...) are filled in, and the rest are the component's own parameters,
which the configuration sets: `*, factor: Annotated[float, Range(0, 1e6)] = 1.5`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from mmprune_train.errors import UserError, nearest

Function = TypeVar("Function", bound=Callable[..., Any])

COUNT = 10**9
"""Most of what is counted: samples, steps, tokens."""
LARGE = 1e30
"""Most of what is measured: in fp32 its square is infinite."""
SMALL = 1e-15
"""Least of what must be more than 0."""


@dataclass(frozen=True)
class Range:
    """From `least` to `most`, both among it unless `below` says that `most` is not."""

    least: float
    most: float = COUNT
    below: bool = False
    says: str = ""
    """What else helps, for the message."""

    def fault(self, value: float) -> str | None:
        """What the value must be; None: it is that."""
        if value < self.least:
            positive = self.least == SMALL and value <= 0
            return f"{'more than 0' if positive else f'at least {_plain(self.least)}'}{self.says}"
        if not value <= self.most or (self.below and value == self.most):
            return f"{'less than' if self.below else 'at most'} {_plain(self.most)}{self.says}"
        return None


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value < COUNT else f"{value:g}"


READS: dict[str, str | None] = {
    **dict.fromkeys(("patches", "grid", "patch_keys", "block_output")),
    "cls": "a CLS token",
    "cls_query_keys": "a CLS token",
    "probe_query_keys": "an attention pooling head",
    "question": "a CLIP text tower",
    **dict.fromkeys(("hidden", "normed", "keys", "query_tokens", "closing_token")),
    **dict.fromkeys(("features", "feature_rank")),
}
"""What components may read: fields of `VisionView`, parts of `LanguageView`, the tokens' features and their effective
rank; and what an encoder must have for it (None: every encoder has it)."""


@dataclass(frozen=True)
class Kind:
    """What components of one kind are called with."""

    told: str
    """For messages and lists."""
    inputs: tuple[str, ...]
    """By position."""
    offered: tuple[str, ...] = ()
    """By name, where a component has an argument of that name."""
    assumed: tuple[str, ...] = ()
    """What a function without a declaration may read."""


KINDS = {
    "vision_score": Kind("stage-1 score", ("view",), assumed=("patches", "grid", "patch_keys")),
    "language_score": Kind("stage-2 score", ("view",), assumed=("hidden", "keys", "query_tokens", "closing_token")),
    "budget": Kind("budget", ("curve", "lengths"), ("features", "feature_rank")),
    "selection": Kind("selection", ("scores", "counts", "features"), ("known", "projected", "words"), ("features",)),
    "merge": Kind("stage-1 merge", ("features", "kept", "scores", "keys"), ("text", "heads", "grid")),
    "language_selection": Kind(
        "stage-2 selection",
        ("scores", "counts", "view", "places", "row"),
        assumed=("hidden", "normed", "keys", "query_tokens", "closing_token"),
    ),
    "language_merge": Kind("stage-2 merge", ("hidden", "places", "row", "dropped", "scores"), ("picture",)),
}
KEYS = {
    "pruner.vision.score": "vision_score",
    "pruner.vision.recover.score": "vision_score",
    "pruner.vision.selection": "selection",
    "pruner.vision.merge": "merge",
    "pruner.language.score": "language_score",
    "pruner.language.selection": "language_selection",
    "pruner.language.merge": "language_merge",
    "knee.method": "budget",
}
"""Keys of the configuration that name a component, and its kind."""


@dataclass(frozen=True)
class Declaration:
    """What a decorator says of a component."""

    kind: str
    name: str = ""
    """By which the configuration knows it; empty: the function's."""
    default_for: str = ""
    """Key that takes it unless told otherwise; of the library's own."""
    reads: tuple[str, ...] = ()
    """Of `READS`; what an encoder does not have is refused before anything is loaded. Of a budget, its arguments say
    it."""
    signed: bool = False
    """Of a score: may be negative."""
    draws: bool = False
    """Of a score: is another one at each call, from torch's generator."""
    weights: str = ""
    """Of a stage-1 score: what in its module makes its weights, a torch module that training trains and the view shows
    as `weights`; called with those of `width` (of the patches), `question_width` (of the question's embedding, None
    where none is read) and the score's own parameters that it has arguments for."""
    divides_sum: bool = False
    """Of a budget: needs scores that are not negative."""
    fixed: str = ""
    """Of a budget: the parameter that alone decides the counts, which are known before the scores: a share of the
    tokens (a float) or a number of them (an int)."""
    positive: bool = False
    """Of a budget: keeps the scores above 0, so that each score says for itself whether its token stays."""
    whole: tuple[str, Callable[[Any, int], bool]] | None = None
    """Of a budget: a parameter, and whether a value of it keeps every row of a length whole."""
    calibrated: tuple[str, Callable[[int], tuple[float, float]]] | None = None
    """Of a budget: the parameter that `task=calibrate` solves for, and the range to search for rows of up to a
    length."""
    exceeds: bool = False
    """Of a selection: may keep more than it is told."""
    weighs: bool = False
    """Of a selection or a merge: weighs by scores, which must not be negative."""
    makes: int | str | None = None
    """Of a merge: tokens that it makes of an image's dropped patches, at most as many as these: a number, or the
    parameter that says it; None: that depends on the image."""

    def __post_init__(self) -> None:
        if callable(self.name):
            raise UserError(f"@{self.kind} is written with brackets: @{self.kind}()")
        reads: Any = self.reads
        if isinstance(reads, str):
            raise UserError(f"@{self.kind}(reads={self.reads!r}) must be a tuple: reads=({self.reads!r},)")
        weights: Any = self.weights
        if not isinstance(weights, str):
            raise UserError(f"@{self.kind}(weights=...) is the name of what makes them, a text")
        if weights and self.kind != "vision_score":
            raise UserError(f"@{self.kind}(weights={weights!r}): stage-1 scores alone have weights that are trained")
        for name in self.reads:
            if name not in READS:
                raise UserError(f"@{self.kind}(reads=...): there is no {name} to read{nearest(name, READS)}")

    def __call__(self, function: Function) -> Function:
        """Mark the function."""
        function.__component__ = self  # type: ignore[attr-defined]
        return function


vision_score = partial(Declaration, "vision_score")
language_score = partial(Declaration, "language_score")
budget = partial(Declaration, "budget")
selection = partial(Declaration, "selection")
merge = partial(Declaration, "merge")
language_selection = partial(Declaration, "language_selection")
language_merge = partial(Declaration, "language_merge")


REQUIRED: Any = "(required)"
"""Default of a parameter that has none."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a component."""

    name: str
    type: str = ""
    """`float`, `int`, `bool`, `str` or `list`; empty: anything."""
    default: Any = REQUIRED
    range: Range | None = None
    choices: tuple[Any, ...] = ()
    nullable: bool = False
    doc: str = ""

    def __str__(self) -> str:
        kind = "|".join(map(str, self.choices)) or self.type or "any"
        default = "" if self.default is REQUIRED else f" = {'null' if self.default is None else self.default}"
        return f"{self.name}: {kind}{default}"

    def take(self, key: str, value: Any) -> Any:
        """The value in the parameter's type. Raises UserError where it is none that the parameter takes.

        Args:
            key: under which it was given.
        """
        if value is None and self.nullable:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.choices:
            if value not in self.choices:
                known = list(map(str, self.choices))
                raise UserError(f"{key}={value} must be one of {', '.join(known)}{nearest(str(value), known)}")
        elif self.type in ("float", "int"):
            if not number or (self.type == "int" and value != value // 1):
                raise UserError(f"{key}={value} must be a {'whole number' if self.type == 'int' else 'number'}")
            value = int(value) if self.type == "int" else float(value)
            if fault := (self.range or Range(-LARGE, LARGE)).fault(value):
                raise UserError(f"{key}={value} must be {fault}")
        elif self.type and type(value).__name__ != self.type:
            told = {"bool": "true or false", "str": "text", "list": "a list, written [a,b]"}[self.type]
            raise UserError(f"{key}={value} must be {told}")
        return value


@dataclass(frozen=True)
class Component(Declaration):
    """A component as it was found."""

    place: str = ""
    """`module:function`."""
    parameters: tuple[Parameter, ...] = ()
    takes: tuple[str, ...] = ()
    """Of what its kind offers, what it has an argument for."""
    doc: str = ""
    package: str = ""
    """Installed package that brings it; empty: this library, or a function of the user's own."""
    declared: bool = True
    """Whether it has a decorator."""
    readable: bool = True
    """Whether its source could be read; if not, its parameters are known once it is imported."""
    fault: str = ""
    """Of its source, which keeps it from being run."""

    @property
    def own(self) -> bool:
        """Whether it is a function of the user's own, named as `module:function`."""
        return ":" in self.name

    @property
    def needs(self) -> list[str]:
        """What an encoder must have for it."""
        return sorted({part for name in self.reads if (part := READS[name])})

    def parameter(self, name: str) -> Parameter | None:
        return next((one for one in self.parameters if one.name == name), None)

    def told(self) -> str:
        """Its parameters, for messages."""
        return f"its parameters: {', '.join(map(str, self.parameters)) or 'none'}"

    def arguments(self, key: str, given: dict[str, Any], keys: dict[str, str] | None = None) -> dict[str, Any]:
        """The given values in the parameters' types.

        Args:
            key: of `given`, e.g. `pruner.vision.selection_args`.
            keys: another key of some parameters.
        Raises:
            UserError: a value that its parameter does not take, an unknown parameter, or a missing one.
        """
        if self.fault:
            raise UserError(f"{self.name}: {self.fault}")
        if not self.readable:
            return dict(given)
        taken = {}
        for name, value in given.items():
            where = (keys or {}).get(name, f"{key}.{name}")
            parameter = self.parameter(name)
            if parameter is None:
                known = [one.name for one in self.parameters]
                hint = nearest(name, known)
                raise UserError(f"{where}={value}: {self.name} has no parameter {name}{hint} ({self.told()})")
            taken[name] = parameter.take(where, value)
        for parameter in self.parameters:
            if parameter.default is REQUIRED and parameter.name not in taken:
                raise UserError(f"{key}.{parameter.name} is not set, and {self.name} needs it ({self.told()})")
        return taken

    def value(self, name: str, given: dict[str, Any]) -> Any:
        """What a parameter is, given or by default."""
        parameter = self.parameter(name)
        assert parameter is not None
        return given.get(name, parameter.default)
