"""Single values: refused with the key, what it may be, and the nearest valid word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmprune_train.config.explain import unknown_name
from mmprune_train.errors import UserError


def one_of(key: str, value: Any, known: Sequence[str | None]) -> None:
    if value not in known:
        raise UserError(unknown_name(key, value, [name or "null" for name in known]))


def component(key: str, name: str, known: Sequence[str]) -> None:
    """One of the library's own, or a function of the user's; the latter is imported when the pruner is built."""
    if ":" not in name:
        one_of(key, name, known)
    elif not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UserError(f"{key}={name}: a function of your own is written module:function, e.g. my_pruner:my_score")


def at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{key}={value} must be at least {least}")


def file_name(key: str, name: str, where: str = "") -> None:
    """A name that files or folders are called by, which must not lead elsewhere."""
    if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise UserError(f"{key}={name} names a folder: no slashes, not empty{where}")
