"""What the dataclasses of the config say of each key, for `--help`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from mmprune_train.config.schema import Config


class Key(NamedTuple):
    name: str
    """Dotted."""
    default: Any
    """None also where only the YAML files have one."""
    says: str
    """Its docstring, or that of the section."""
    section: bool
    """Whether it has keys below it."""


def describe(name: str, cls: Any = Config, prefix: str = "") -> list[Key]:
    """A key; of a section itself and then those directly in it."""
    head, _, rest = name.partition(".")
    item = {field.name: field for field in dataclasses.fields(cls)}[head]
    hint = _without_none(get_type_hints(cls)[head])
    inner: Any = hint if dataclasses.is_dataclass(hint) else None
    if rest:
        assert inner is not None
        return describe(rest, inner, f"{prefix}{head}.")
    section = inner is not None or get_origin(hint) is dict
    says = _docs(cls).get(head) or (inspect.getdoc(inner) if _has_doc(inner) else "") or ""
    found = [Key(prefix + head, None if section else _default(item), says, section)]
    for field in dataclasses.fields(inner) if inner else ():
        found.append(describe(field.name, inner, f"{prefix}{head}.")[0])
    return found


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _has_doc(cls: Any) -> bool:
    return cls is not None and not (cls.__doc__ or "").startswith(f"{cls.__name__}(")  # dataclass writes one itself


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


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
