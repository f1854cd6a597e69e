"""Secrets: the process uses them, and what it writes and prints has `***` in their place.

A secret is what a key or an environment variable that sounds like one gives (`api_key`, `HF_TOKEN`, `password`), or a
password in an address. In texts it is searched for, unless it is a number or a word of this project (`true`, `demo`,
`mean`): there it tells nothing, and other settings and results would be lost with it.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmprune_train.storage.conf import conf_dir

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
_PAIR = re.compile(r"""([\w.]+)\s*[=:]\s*("[^"]*"|'[^']*'|[^,{}\[\]\s]+)""")
_ENV = re.compile(r"(?<!\\)\$\{oc\.env:\s*(\w+)")
_ADDRESS = re.compile(r"://[^/:@\s]*:([^/@\s]+)@")

_values: dict[str, str] = {}
"""Text -> what stands for it."""


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
    package = Path(__file__).parent.parent
    return "\n".join(file.read_text("utf-8") for file in (*package.rglob("*.py"), *conf_dir().rglob("*.yaml")))


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
        note_text(argument)


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


def note_text(text: str) -> list[str]:
    """The environment's variables that a text refers to, those that sound secret learnt."""
    for password in _ADDRESS.findall(text):
        hide(password)
    names = _ENV.findall(text)
    for name in filter(sounds_secret, names):
        hide(os.environ.get(name))
    return names
