"""Keys under their former names: who types one is told the new one, settings saved with one are read as the new one.

A rename is one line of `RENAMED`; a key whose default is not what was done before it existed is one of `ADDED`.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mmprune_train.config.typed import as_typed
from mmprune_train.errors import UserError


class Renamed(NamedTuple):
    key: str
    """Dotted, of now; each `*` is what the same one of the former key is."""
    values: Mapping[str, str] = MappingProxyType({})
    """Former value -> value of now, where they differ."""
    until: str = "0.2"
    """Release after which the line goes; a test watches."""


RENAMED = {
    "pruner.vision.share": Renamed("pruner.vision.selection_args.share"),
    "pruner.vision.merge_count": Renamed("pruner.vision.merge_args.count"),
    "pruner.language.merge_share": Renamed("pruner.language.merge_args.share"),
    "pruner.language.merge_size": Renamed("pruner.language.merge_args.size"),
    "pruner.language.signal": Renamed("pruner.language.score_layer", {"next": "current"}),
    "pruner.language.amounts": Renamed("pruner.language.per_layer_budgets"),
    "pruner.language.raters": Renamed("pruner.language.query_tokens"),
}
"""Former dotted key, of a setting or of a section with all below it -> what it is now. `*` stands for one part."""
ADDED = {"pruner.language.min_per_image": 0}
"""Key -> what was done before it existed, which settings saved without it mean."""


def present(key: str) -> Renamed | None:
    """What a dotted key is now; None: it has its name still."""
    for former, row in RENAMED.items():
        if match := re.fullmatch(re.escape(former).replace(r"\*", r"(\w+)") + r"((?:\..+)?)", key):
            *parts, below = match.groups()
            return row._replace(key=row.key.replace("*", "{}").format(*parts) + below)
    return None


def present_override(override: str) -> str | None:
    """The override of the command line that a former one is now; None: its key has its name still."""
    match = re.fullmatch(r"([+~]{0,2})([\w.]+)(=.*)?", override, flags=re.DOTALL)
    row = present(match[2]) if match else None
    if match is None or row is None:
        return None
    value = re.sub(r"\w+", lambda word: row.values.get(word[0], word[0]), match[3] or "")
    return f"{match[1]}{row.key}{value}"


def present_name(key: str) -> str | None:
    """What to tell of a former key whose value is not known; None: it has its name still."""
    if (row := present(key)) is None:
        return None
    values = ", ".join(f"{former} is now {new}" for former, new in row.values.items())
    return f"{key} is now {row.key}{f' ({values})' if values else ''}"


def renamed(overrides: Iterable[str]) -> str:
    """A line for those overrides whose keys have other names now; empty: all have theirs still."""
    return "; ".join(f"{one} is now {new}" for one in overrides if (new := present_override(one)) is not None)


def refuse_former(overrides: Iterable[str]) -> None:
    """Raise UserError with the line of `renamed`, where there is one."""
    if told := renamed(overrides):
        raise UserError(told)


def former_settings(settings: Mapping[Any, Any]) -> list[str]:
    """Settings that have other names now, as overrides."""
    return [f"{key}={as_typed(value)}" for key, value in _former(settings)]


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were saved, under the names of now, with what was done before a key existed where they lack it."""
    new = _without_former(settings)
    for key, value in _former(settings):
        row = present(key)
        assert row is not None
        _put(new, row.key, row.values.get(value, value) if isinstance(value, str) else value)
    for key, value in ADDED.items():
        _put(new, key, value)
    return new


def _former(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _former(value, f"{name}.")
        elif present(name):
            yield name, value


def _without_former(settings: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    return {
        key: _without_former(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if not present(f"{prefix}{key}")
    }


def _put(settings: dict[Any, Any], key: str, value: Any) -> None:
    """Set what is not set; where a section is none, which the check of the whole tells, nothing."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            return
    settings.setdefault(last, value)
