"""Every key there is, and what the dataclasses of the config say of it, for `--help`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from mmprune_train.config.schema import Config, data_config

LLAVA = ("pretrain", "instruct")
"""Training stages, where no config is at hand that lists them."""


class Key(NamedTuple):
    name: str
    """Dotted."""
    cls: type
    """The dataclass that has it."""
    field: dataclasses.Field[Any]
    below: type | None
    """The dataclass of the keys below it."""

    @property
    def section(self) -> bool:
        """Whether it has keys below it."""
        return self.below is not None or self.field.default_factory is dict

    @property
    def default(self) -> Any:
        """None also where only the YAML files have one."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()

    @property
    def says(self) -> str:
        """Its docstring, or that of the section."""
        below = inspect.getdoc(self.below) or "" if self.below else ""
        own_doc = self.below is not None and not below.startswith(f"{self.below.__name__}(")  # else dataclass wrote it
        return _docs(self.cls).get(self.field.name) or (below if own_doc else "")


@functools.cache
def keys(stages: tuple[str, ...] = LLAVA, cls: type = Config, prefix: str = "") -> tuple[Key, ...]:
    """Every key of a config dataclass, those below it after each; `stage` and `data` are spelt out for these training
    stages."""
    found: list[Key] = []
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        name, hint = prefix + item.name, hints[item.name]
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(part for part in get_args(hint) if part is not type(None))
        inner = data_config(stages) if name == "data" else hint
        below = cast("type", inner) if dataclasses.is_dataclass(inner) else None
        found.append(Key(name, cls, item, below))
        if below:
            found += keys(stages, below, f"{name}.")
        elif get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            part = cast("type", get_args(hint)[1])
            for stage in stages:
                found += [Key(f"{name}.{stage}", cls, item, part), *keys(stages, part, f"{name}.{stage}.")]
    return tuple(found)


def all_keys(stages: tuple[str, ...] = LLAVA) -> tuple[str, ...]:
    """Their dotted names."""
    return tuple(key.name for key in keys(stages))


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for item, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(item.target, ast.Name)
            found[item.target.id] = " ".join(str(after.value.value).split())
    return found
