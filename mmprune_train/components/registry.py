"""Components by name: the library's, those of installed packages, and functions of the user's own.

Nothing is imported to know them, only read (`source.py`): lists, `--help` and checks need no torch, and a name in
settings of somebody else runs nothing.
"""

from __future__ import annotations

import functools
import re
from importlib.metadata import entry_points
from pathlib import Path

from mmprune_train.components.declare import KEYS, KINDS, Component
from mmprune_train.components.source import declaration_of, functions_of, read_function, read_place, unread
from mmprune_train.errors import UserError, unknown_name

GROUP = "mmprune_train.components"
"""Entry points by which an installed package brings components: name = module:function."""
LIBRARY = Path(__file__).parent.parent / "pruning"
"""Folder whose modules define the library's components."""


@functools.cache
def library() -> dict[str, dict[str, Component]]:
    """Kind -> name -> component of the library's own, as they stand in their modules, first those with a default."""
    by_file = []
    for file in sorted(LIBRARY.glob("*.py")):
        module = f"mmprune_train.{LIBRARY.name}.{file.stem}"
        declared = [read_function(node, module) for node in functions_of(file) if declaration_of(node)]
        by_file.append(declared)
    by_file.sort(key=lambda declared: not any(one.default_for for one in declared))
    table: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}
    for one in (one for declared in by_file for one in declared):
        assert one.name not in table[one.kind], f"two components are called {one.name}"
        table[one.kind][one.name] = one
    return table


@functools.cache
def declared() -> dict[str, dict[str, Component]]:
    """The library's and those of installed packages.

    Raises:
        UserError: an installed package's component cannot be read, or has the name of another.
    """
    table = {kind: dict(components) for kind, components in library().items()}
    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist else entry.module
        told = f"entry point {entry.name} = {entry.value} of package {package}"
        try:
            one = read_place(entry.value, "", entry.name, package)
        except UserError as error:
            raise UserError(f"{told}: {error}; mend the package, or uninstall it") from error
        if one is None or not one.declared:
            raise UserError(
                f"{told} names no component: a function of a Python file, decorated with one of "
                f"{', '.join(f'@{name}' for name in KINDS)}; mend the package, or uninstall it"
            )
        if taken := table[one.kind].get(one.name):
            owner = f"package {taken.package}" if taken.package else "the library"
            raise UserError(f"{told}: {owner} has a {KINDS[one.kind].told} of that name; rename it, or uninstall it")
        table[one.kind][one.name] = one
    return table


def names(kind: str) -> list[str]:
    """Of all components of a kind."""
    return list(declared()[kind])


def find(kind: str, name: str, key: str) -> Component:
    """The component that `key` names.

    Raises:
        UserError: there is none, or it is declared as one of another kind.
    """
    if ":" not in name:
        if name not in declared()[kind]:
            known = [*(["none"] if kind.endswith("merge") else []), *names(kind)]
            raise UserError(f"{unknown_name(key, name, known)}, or a function of yours as module:function")
        return declared()[kind][name]
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UserError(f"{key}={name}: a function of your own is written module:function, e.g. my_pruner:my_score")
    try:
        one = read_place(name, kind, name) or unread(kind, name)
    except UserError as error:  # told where the component is to be run
        one = unread(kind, name, str(error))
    return of_kind(one, kind, key)


def of_kind(one: Component, kind: str, key: str) -> Component:
    """The component itself; UserError where it is declared as one of another kind."""
    if one.kind != kind:
        raise UserError(f"{key}={one.name} is declared as a {KINDS[one.kind].told}; {key} wants a {KINDS[kind].told}")
    return one


def default_of(key: str) -> str:
    """The component that a key names unless told otherwise."""
    (name,) = (one.name for one in library()[KEYS[key]].values() if one.default_for == key)
    return name
