"""Secrets among the settings: the process uses them, and what it writes and prints has `***` in their place.

A secret is what a key or an environment variable that sounds like one gives (`api_key`, `HF_TOKEN`, `password`), or a
password in an address. Of all else that `${oc.env:X}` gives, text is left out of config.yaml and of what makes a run
the run it is, unless the key takes a path or a name of this project's.

In texts a secret is searched for, unless it is a number or a word of this project (`true`, `demo`, `mean`): there it
tells nothing, and other settings and results would be lost with it.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmprune_train.config.paths import conf_dir
from mmprune_train.config.typed import PATHS, WORDS

MASK = "***"
LEAST = 4
"""Characters of a secret that is looked for in texts; shorter ones are found by their key alone."""
LONG = 16
"""From so many characters on it is looked for whatever it is."""

_SOUNDS = re.compile(
    r"(^|_)(secrets?|passwords?|passwd|passphrase|pwd|credentials?|(api|access|private|auth|signing|ssh)_?keys?)(_|$)"
    r"|(^|_)(auth|authorization|bearer|cookie)$"
)
_OF_TEXT = (
    "image", "video", "audio", "visual", "text", "special", "query", "begin", "start", "end", "boi", "eoi", "bos",
    "eos", "pad", "unk", "cls", "sep", "mask", "stop", "extra", "last", "next", "new", "per",
)  # fmt: skip
"""Words before `_token` that a tokenizer's settings have."""
_OPEN = re.compile(
    r"(task|experiment_name|run_id|stages|init_adapters|knee|pruner|projector|strategy|peft|optim|trainer|stage|evaluate"
    r"|generate|bench|calibrate|plan|sweep|report)(\..*)?|.*\.(name|source|template|mode)(\..*)?"
)
"""Keys whose text is a name, and no secret."""
_PAIR = re.compile(r"""([\w.]+)\s*[=:]\s*("[^"]*"|'[^']*'|[^,{}\[\]\s]+)""")
_ENV = re.compile(r"(?<!\\)\$\{oc\.env:\s*(\w+)")
_ADDRESS = re.compile(r"://[^/:@\s]*:([^/@\s]+)@")

_values: dict[str, str] = {}
"""Text -> what stands for it."""
_given: set[tuple[str, str]] = set()
"""Keys with the text that the environment gives them."""


def sounds_secret(key: str) -> bool:
    """Whether a key or variable is called as secrets are; `token_budget`, `image_token` and `num_tokens` are not."""
    last = key.rpartition(".")[2].lower()
    kind = last.removesuffix("token").rstrip("_").rpartition("_")[2]
    return _SOUNDS.search(last) is not None or (last.endswith("token") and kind not in _OF_TEXT)


def hide(value: str | None) -> None:
    """Take this text for a secret from now on."""
    if value and value != MASK and len(value) >= LEAST and (len(value) >= LONG or not _says_nothing(value)):
        in_json = (json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
        _values.update(dict.fromkeys((value, html.escape(value), *in_json), MASK))


def _says_nothing(value: str) -> bool:
    """Whether a text is a number, or stands in this project's own files."""
    try:
        float(value.replace("_", ""))
    except ValueError:
        return value in _own_text() or value.lower() in _own_text()
    return True


@functools.cache
def _own_text() -> str:
    here = Path(__file__).parent
    return "\n".join(file.read_text("utf-8") for file in (*here.rglob("*.py"), *conf_dir().rglob("*.yaml")))


def note_arguments(arguments: Iterable[str]) -> None:
    """Learn the secrets that a command line gives."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        for pair, name, given in [
            (argument, key, value),
            *(found.group(0, 1, 2) for found in _PAIR.finditer(argument)),
        ]:
            if given and sounds_secret(name) and not _ENV.search(given):
                hide(given.strip("\"'"))
                _values[pair] = pair.removesuffix(given) + MASK
        _note_text(argument)


def note_settings(tree: Mapping[str, Any]) -> set[str]:
    """Learn the secrets of a composed config, its interpolations as they are written; returns the keys whose text the
    environment gives and nothing may tell."""
    keys = set()
    for key, value in _leaves(tree):
        names = _note_text(value)
        if names and (any(map(sounds_secret, names)) or not _is_open(key)):
            keys.add(key)
        if sounds_secret(key) and not names:
            hide(value)
    return keys


def note_given(keys: set[str], tree: Mapping[str, Any]) -> None:
    """Learn what the environment gives these keys of a config, of which all is filled in."""
    _given.update((key, value) for key, value in _leaves(tree) if key in keys)


def masked(text: str) -> str:
    """A text without the secrets."""
    if not _values:
        return text
    known = sorted(_values, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, known)), lambda found: _values[found[0]], text)


def masked_texts(value: Any) -> Any:
    """What JSON is to hold, without the secrets in its texts: never in a number, a name or its notation."""
    if isinstance(value, Mapping):
        return {key: masked_texts(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [masked_texts(part) for part in value]
    return masked(value) if isinstance(value, str) else value


def masked_settings(tree: Any, key: str = "") -> Any:
    """Settings as they may be written, and compared with those that were."""
    if isinstance(tree, Mapping):
        return {name: masked_settings(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [masked_settings(value, f"{key}[{place}]") for place, value in enumerate(tree)]
    if not isinstance(tree, str) or not tree:
        return tree
    return MASK if (key, tree) in _given or sounds_secret(key) else masked(tree)


def _note_text(text: str) -> list[str]:
    """The environment's variables that a text refers to, those that sound secret learnt."""
    for password in _ADDRESS.findall(text):
        hide(password)
    names = _ENV.findall(text)
    for name in filter(sounds_secret, names):
        hide(os.environ.get(name))
    return names


def _is_open(key: str) -> bool:
    last = re.sub(r"\[\d+\]$", "", key).rpartition(".")[2]
    return last in PATHS or key in WORDS or _OPEN.fullmatch(key) is not None


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from _leaves(value, f"{key}[{place}]")
    elif isinstance(tree, str):
        yield key, tree
