"""What numbers and texts may be: the range stands at each field of the config, and is held here.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmprune_train.components.declare import COUNT, LARGE, SMALL, Range
from mmprune_train.config.typed import FILES, LINES, PATHS
from mmprune_train.errors import UserError, unknown_name


def number(default: Any, least: float, most: float = COUNT, below: bool = False, says: str = "") -> Any:
    """A field that holds a number in this range, or a list of such numbers; None where its type lets it be null."""
    return _field(default, range=Range(least, most, below, says))


def choice(default: Any, *known: str) -> Any:
    """A field that holds one of these words, or a list of them; None where that is the default."""
    return _field(default, choices=known if default is not None else (*known, "null"))


def folder_name(default: Any) -> Any:
    """A field whose text names one folder."""
    return _field(default, folder=True)


def _field(default: Any, **held: Any) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=held)
    return dataclasses.field(default=default, metadata=held)


def positive(default: Any, most: float = LARGE, says: str = "") -> Any:
    """One that is more than 0."""
    return number(default, SMALL, most, says=says)


def share(default: Any, of: str) -> Any:
    """One that is more than 0 and at most 1."""
    return number(default, SMALL, 1, says=f": a share of {of}")


def check_values(tree: Any, prefix: str = "") -> None:
    """Raise UserError for a number out of its key's range or not finite, a word that is none of its key's, and a text
    that no file or library takes.

    Args:
        tree: a config, or one of its dataclasses.
        prefix: dotted name of the tree with a dot behind it, for the messages.
    """
    for item in dataclasses.fields(tree):
        key, value = prefix + item.name, getattr(tree, item.name)
        if value == "" and (item.default is None or (item.name in PATHS and item.name != "images")):
            raise UserError(f"{key} is empty; give it a value, or leave it out")
        kind = re.split(r"\W", str(item.type))[0]
        if kind.endswith("Config") and value is not None and type(value).__name__ != kind:  # OmegaConf asks `${x}` not
            raise UserError(f"{key}={value} has keys of its own; write them one by one")
        if kind in ("list", "dict") and not isinstance(value, list | tuple | Mapping | None):
            raise UserError(f"{key}={value} must be a {kind}")
        if isinstance(value, list) and any(isinstance(inner, list | Mapping) for inner in value):
            raise UserError(f"{key}={value} must be a list of single values, written [a,b]")
        for where, leaf in _leaves(key, value):
            _check_leaf(where, leaf, item.metadata)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        check_values(value, f"{key}.")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield key, name
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(key, inner)
    else:
        yield key, value


def _check_leaf(key: str, value: Any, held: Mapping[str, Any]) -> None:
    if isinstance(value, str):
        _check_text(key, value)
        if "choices" in held and value not in held["choices"]:
            raise UserError(unknown_name(key, value, held["choices"]))
        if "folder" in held:
            _check_folder_name(key, value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise UserError(f"{key}={str(value)[:20]}... has {len(str(abs(value)))} digits; give a smaller number")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is not finite; give a number")
        if "range" in held and (fault := held["range"].fault(value)):
            raise UserError(f"{key}={value} must be {fault}")


def _check_text(key: str, text: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{key}={text!r} is not valid UTF-8, or holds a NUL character; write it without")
    is_path = key.rpartition(".")[2] in PATHS or key in FILES
    if "\n" in text and not is_path and key not in LINES:
        raise UserError(f"{key}={text!r} has several lines; write it in one")
    if is_path and (len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/"))):
        raise UserError(f"{key}={text[:60]}...: no path is as long as that ({len(text)} characters); correct it")


def _check_folder_name(key: str, name: str) -> None:
    """Other words are put behind the name, so it may not be as long as a file system allows."""
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"{key}={name} names a folder: no slashes, not empty; runs_dir= says where runs go")
    if len(name.encode()) > 160:
        raise UserError(f"{key}={name[:40]}... names a folder: at most 160 bytes, this has {len(name.encode())}")
    if not name.isprintable() or name != name.strip():
        raise UserError(f"{key}={name!r} names a folder: no control characters, no spaces around it")
