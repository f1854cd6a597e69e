"""Components as their source says it: decorators, annotations and defaults, read by an evaluator that runs no code."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mmprune_train.components import declare
from mmprune_train.components.declare import KINDS, REQUIRED, Component, Declaration, Parameter, Range
from mmprune_train.errors import UserError, nearest

UNREAD: Any = "..."
"""A default that only running the code would tell."""

DECORATORS: dict[str, Callable[..., Declaration]] = {kind: getattr(declare, kind) for kind in KINDS}
_NAMES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (float, int, bool, str, list, Range)},
    **{name: getattr(declare, name) for name in ("COUNT", "LARGE", "SMALL")},
    **{"Annotated": Annotated, "Literal": Literal, "Optional": Union},
}
"""What annotations and decorators may name."""
_NUMBERS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


class Unreadable(Exception):
    """An expression that would have to be run."""


def _value(node: ast.expr) -> Any:
    """What an expression of literals, `_NAMES` and ranges means."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in _NAMES:
            return _NAMES[name]
        case ast.Tuple(elts=parts):
            return tuple(map(_value, parts))
        case ast.List(elts=parts):
            return [_value(part) for part in parts]
        case ast.Subscript(value=base, slice=index):
            kind = _value(base)
            return kind[(_value(index), None) if kind is Union else _value(index)]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_value(left), _value(right)]  # noqa: UP007  (of a Literal, too)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _NUMBERS:
            a, b = _value(left), _value(right)
            if isinstance(a, int | float) and isinstance(b, int | float) and b:
                return _NUMBERS[type(op)](a, b)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.Call(func=ast.Name(id="Range") | ast.Attribute(attr="Range"), args=args, keywords=keywords):
            return Range(*map(_value, args), **{word.arg: _value(word.value) for word in keywords if word.arg})
        case ast.Lambda(args=ast.arguments(defaults=[], kw_defaults=[])):  # made here, run by who imports the module
            code = compile(ast.Expression(node), "<declaration>", "eval")
            return eval(code, {"__builtins__": {"max": max, "min": min}})
    raise Unreadable


def _read(node: ast.expr | None, otherwise: Any) -> Any:
    try:
        return otherwise if node is None else _value(node)
    except (Unreadable, TypeError):
        return otherwise


def declaration_of(node: ast.FunctionDef) -> Declaration | None:
    """What the function's decorator says; None: it has none of ours."""
    for decorator in node.decorator_list:
        match decorator:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), keywords=words) if name in DECORATORS:
                known = [item.name for item in dataclasses.fields(Declaration)]
                if unknown := [word.arg for word in words if word.arg and word.arg not in known]:
                    raise UserError(f"@{name}({unknown[0]}=...): there is no such argument{nearest(unknown[0], known)}")
                return DECORATORS[name](**{word.arg: _value(word.value) for word in words if word.arg})
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in DECORATORS:
                raise UserError(f"@{name} is written with brackets: @{name}()")
    return None


def _parameter(name: str, hint: Any, default: Any, doc: str) -> Parameter:
    allowed, choices, nullable, kind = None, (), False, ""
    while get_origin(hint) is not None:
        inner = get_args(hint)
        if get_origin(hint) is Annotated:
            allowed = next((part for part in inner if isinstance(part, Range)), None)
            hint = inner[0]
        elif get_origin(hint) is Literal:
            choices, hint = inner, None
        elif type(None) in inner:
            nullable, hint = True, next(part for part in inner if part is not type(None))
        else:
            hint = get_origin(hint)
    if hint in (float, int, bool, str, list):
        kind = hint.__name__
    return Parameter(name, kind, default, allowed, choices, nullable, doc)


def _component(
    declaration: Declaration | None,
    kind: str,
    name: str,
    place: str,
    arguments: Iterable[tuple[str, Any, Any]],
    docstring: str | None,
    package: str = "",
) -> Component:
    """
    Args:
        arguments: name, annotation and default of each, in order.
    """
    known = KINDS[kind]
    rest = list(arguments)[len(known.inputs) :]
    doc = inspect.cleandoc(docstring or "")
    takes = tuple(one for one, *_ in rest if one in known.offered)
    found: dict[str, Any] = {
        "name": name,
        "place": place,
        "parameters": tuple(
            _parameter(one, hint, default, _argument_doc(doc, one))
            for one, hint, default in rest
            if one not in known.offered
        ),
        "takes": takes,
        "doc": re.split(r"^Args:$", doc, maxsplit=1, flags=re.MULTILINE)[0].strip(),
        "package": package,
        "declared": declaration is not None,
    }
    if kind == "budget":
        found["reads"] = takes
    return Component(**vars(declaration or Declaration(kind, reads=known.assumed)) | found)


def _argument_doc(doc: str, name: str) -> str:
    """What the `Args:` section of a docstring says of an argument."""
    says = re.search(rf"^    {name}: (.*(?:\n {{5,}}.*)*)", doc.partition("Args:\n")[2], re.MULTILINE)
    return " ".join(says[1].split()) if says else ""


def read_function(node: ast.FunctionDef, module: str, kind: str = "", name: str = "", package: str = "") -> Component:
    """
    Args:
        kind: where the caller knows it; a declaration says it.
        name: where the caller knows it; the library's declarations say it.
    """
    try:
        declaration = declaration_of(node)
    except Unreadable:
        if not kind:
            raise
        declaration = None  # what it says is known once its module is imported
    spec = node.args
    listed = [*spec.posonlyargs, *spec.args]
    required = len(listed) - len(spec.defaults)
    defaults: list[ast.expr | None] = [*[None] * required, *spec.defaults, *spec.kw_defaults]
    arguments = [
        (one.arg, _read(one.annotation, None), REQUIRED if default is None else _read(default, UNREAD))
        for one, default in zip([*listed, *spec.kwonlyargs], defaults, strict=True)
    ]
    if declaration:
        kind, name = declaration.kind, name or declaration.name
    place = f"{module}:{node.name}"
    return _component(declaration, kind, name or node.name, place, arguments, ast.get_docstring(node), package)


def read_imported(function: Callable[..., Any], kind: str, name: str) -> Component:
    """The component that a function is, once its module is imported."""
    arguments = []
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of C has no signature
        return unread(kind, name)
    for one in parameters:
        hint = one.annotation
        if isinstance(hint, str):
            hint = _read(ast.parse(hint, mode="eval").body, None)
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            arguments.append((one.name, hint, REQUIRED if one.default is one.empty else one.default))
    declaration = getattr(function, "__component__", None)
    place = f"{function.__module__}:{function.__name__}" if hasattr(function, "__name__") else name
    return _component(declaration, kind, name, place, arguments, function.__doc__)


def functions_of(file: Path) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{file}{f', line {error.lineno}' if error.lineno else ''}: {error.msg}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: {error}") from error
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def source_of(module: str) -> Path | None:
    """The Python file of a module, which is not imported, nor are the packages around it; the current folder comes
    last."""
    search: list[str] | None = [*sys.path, os.getcwd()]  # noqa: PTH109
    spec = None
    importlib.invalidate_caches()
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), search) or (_elsewhere(module) if count == 1 else None)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _elsewhere(module: str) -> ModuleSpec | None:
    """A module alone, or a package, as other finders know it (of editable installations)."""
    try:
        return importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return None


def read_place(place: str, kind: str, name: str, package: str = "") -> Component | None:
    """The component at `module:function`, by its source; None: it is not there, or not a plain function of the file.

    Raises:
        UserError: the file is no Python, or the function's decorator has arguments that it does not take.
    """
    module, _, function = place.partition(":")
    file = source_of(module)
    for node in functions_of(file) if file else ():
        try:
            if node.name == function and (kind or declaration_of(node)):
                return read_function(node, module, kind, name, package)
        except Unreadable:
            return None
        except UserError as error:
            raise UserError(f"{file}, line {node.lineno}: {error}") from error
    return None


def unread(kind: str, place: str, fault: str = "") -> Component:
    """A function whose source says nothing.

    Args:
        fault: why it cannot be run.
    """
    reads = KINDS[kind].assumed
    return Component(kind, place, reads=reads, place=place, declared=False, readable=False, fault=fault)
