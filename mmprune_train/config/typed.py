"""The command line as it was typed: which keys it gives, and words that Hydra's grammar would not let through."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

WORDS = ("generate.question",)
"""Keys whose value is the rest of the argument, whatever it holds."""
LINES = (*WORDS, "pruner.vision.question_ends")
"""Keys whose text may hold line breaks."""
FILES = ("generate.images", "report.runs")
"""Keys that take a list of files: `[a (1).png, b.png]`, or one file without brackets."""
PATHS = frozenset(
    {
        "ckpt", "init_from", "runs_dir", "root", "annotations", "images", "blind", "path", "output", "question_file",
        "feature_cache_dir", "out", "vision_tower",
    }
)  # fmt: skip
"""Last parts of the keys that take one path."""


def readable(arguments: Sequence[str]) -> list[str]:
    """The command line with quotes, as Hydra's grammar wants them, around the words and paths that lack them.

    Of paths only those that Hydra could not read are touched. What is quoted already keeps its meaning, so that a
    command line that went through here may do so again.
    """
    return [_readable(argument) for argument in arguments]


def _readable(argument: str) -> str:
    match = re.fullmatch(r"(\+{0,2}([\w.]+)=)(.*)", argument, flags=re.DOTALL)
    if not match:
        return argument
    head, key, value = match.groups()
    if key in WORDS:
        return argument if value[:1] in ("'", '"') and _parsed(argument) else head + quoted(value)
    if key in FILES and value:
        return head + _file_list(argument, value)
    if key.rpartition(".")[2] in PATHS and not value.startswith("[") and not _parsed(argument):
        return head + quoted(value)
    return argument


def _file_list(argument: str, value: str) -> str:
    parsed = _parsed(argument)
    if parsed is not None:
        single = not parsed.is_sweep_override() and isinstance(parsed.value(), str | int | float)
        return f"[{value}]" if single else value
    if not (value.startswith("[") and value.endswith("]")):
        return f"[{quoted(value)}]"
    parts = re.findall(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]+?)\s*(?:,|$)""", value[1:-1])
    return f"[{','.join(part if part[0] in _QUOTES and part[-1] == part[0] else quoted(part) for part in parts)}]"


_QUOTES = ("'", '"')


@functools.cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _parsed(argument: str) -> Any:
    """Hydra's own reading of an argument; None where it has none."""
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(argument)
    except HydraException:
        return None


def quoted(text: str) -> str:
    """Words in the quotes from which Hydra, and OmegaConf after it, read exactly these words."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(literal(text), Quote.double).with_quotes()


def literal(tree: Any) -> Any:
    """Texts, also those in mappings and lists, as OmegaConf reads them unchanged: what looks like an interpolation, for
    which it would look into the environment, is none."""
    if isinstance(tree, Mapping):
        return {key: literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [literal(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def options_of(override: str) -> list[str]:
    """Options that an override of a config group chooses."""
    parsed = _parsed(override)
    value = None if parsed is None or parsed.is_delete() or parsed.is_sweep_override() else parsed.value()
    return [option for option in (value if isinstance(value, list) else [value]) if isinstance(option, str)]


def key_of(override: str) -> str:
    """Key of an override: `pruner.vision.score` of `+pruner.vision.score=random`."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def group_of(override: str) -> str:
    """First part of an override's key: `pruner` of `+pruner.vision.score=random`."""
    return key_of(override).split(".", 1)[0]


def as_typed(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{as_typed(inner)}' for key, inner in value.items())}}}"
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)
