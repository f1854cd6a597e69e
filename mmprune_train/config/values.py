"""Single values: refused with the key, what it may be, and the nearest valid word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmprune_train.errors import UserError, unknown_name


def one_of(key: str, value: Any, known: Sequence[str | None]) -> None:
    if value not in known:
        raise UserError(unknown_name(key, value, [name or "null" for name in known]))


def at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{key}={value} must be at least {least}")
