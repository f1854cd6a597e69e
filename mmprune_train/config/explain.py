"""Hydra's and OmegaConf's errors in a line or two that name the key and the nearest valid one."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from mmprune_train.config.docs import LLAVA, all_keys
from mmprune_train.config.renamed import former_settings, present_name, renamed
from mmprune_train.config.typed import key_of, quoted
from mmprune_train.errors import UserError, unknown_name
from mmprune_train.storage.conf import options
from mmprune_train.storage.user_files import reason_of

_PLUS_GROUPS = ("experiment", "sweep", "hydra/launcher", "hydra/sweeper")

_PLUGINS = {"hydra/sweeper": ("optuna",), "hydra/launcher": ("joblib", "submitit_local", "submitit_slurm")}
"""What the extra `sweep` installs."""


def unknown_key(key: str, stages: tuple[str, ...] = LLAVA) -> str:
    """A line for a key that the schema does not have, with the most likely one that it has for these stages."""
    if told := present_name(key):
        return told
    keys = [*all_keys(stages), *_PLUS_GROUPS]
    head, last = key.split(".", 1)[0], key.rsplit(".", 1)[-1]
    found = difflib.get_close_matches(key, [k for k in keys if not key.startswith(f"{k}.")], n=1, cutoff=0.6)
    if not found or found[0].rsplit(".", 1)[-1] != last:
        # `pruner.score` is far from `pruner.vision.score` as a string but near as a path: same first and last part.
        paths = [k for k in keys if k.split(".", 1)[0] == head and k.rsplit(".", 1)[-1] == last and k != key]
        found = paths[:1] or found
    return f"{key}: there is no such key; " + (f"did you mean {found[0]}?" if found else "--cfg job lists every key")


def _stages_of(error: BaseException | None) -> tuple[str, ...]:
    """The training stages of the tree that an error of OmegaConf is about."""
    node = getattr(error, "parent_node", None)
    stages = () if node is None else node._get_root().get("stage") or ()
    return tuple(map(str, stages)) or LLAVA


_RIGHTS = "let this user in there, or name another place: runs_dir=, of the cache the variable MMPRUNE_CACHE"
_DISK = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "name a place that can be written to: runs_dir=, of the cache the variable MMPRUNE_CACHE",
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.ENOTDIR: "a file stands where a folder is needed: correct the path",
    errno.EEXIST: "something else stands where a folder is needed: correct the path",
    errno.EISDIR: "a folder stands where a file is needed: correct the path",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ELOOP: "its links go round: correct the path",
    errno.EPIPE: "what read this command's output has ended",
}
"""What an operating system finds wrong with a place that the user has named -> the remedy."""


_FULL = os.strerror(errno.ENOSPC)


def user_mistake(error: Exception, overrides: Sequence[str] = ()) -> str | None:
    """The message for the user when the error is their input's, or their disk's, else None.

    Args:
        error: what was raised.
        overrides: the command's: one of them may name the file or folder that the error is of.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, HydraException | OmegaConfBaseException):
        message = explain(error).replace("\n", "\\n")
    elif isinstance(error, OSError) and error.errno in _DISK and error.filename:
        message = f"{_named(error.filename, overrides)}: {error.strerror}; {_DISK[error.errno]}"
    elif _FULL in str(error):  # a library's writer, or ours: neither says which file
        message = f"{reason_of(error)}; make room, or name another place: runs_dir=, of the cache MMPRUNE_CACHE"
    elif (found := _at_override(error)) is not None:
        message = found.replace("\n", "\\n")
    else:
        return None
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:120]}...{word[0][-40:]}", message)


def _named(place: object, overrides: Sequence[str]) -> str:
    """A file or folder behind the key of the command line that names it, or a folder around it."""
    path = Path(str(place))
    for override in overrides:
        value = override.partition("=")[2]
        if value and Path(value).expanduser() in (path, *path.parents):
            return f"{key_of(override)}: {path}"
    return str(path)


_NO_OPTION = "give the name of an option of this group"
_READS_OVERRIDES = ("parse_overrides", "_apply_overrides_to_config", "__init__")
"""Functions of Hydra that hold the one they are at in a variable `override`; the last one is that of the groups'."""


def _at_override(error: Exception) -> str | None:
    """A line for what Hydra, or OmegaConf below it, breaks at without saying which override it was. None: it is an
    error of something else."""
    from omegaconf import OmegaConf

    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        module, function, held = frame.f_globals.get("__name__", ""), frame.f_code.co_name, frame.f_locals
        if not module.startswith("hydra."):
            continue
        if function in _READS_OVERRIDES and "override" in held:
            break
        for override in held["overrides_list"] if function == "create_defaults_list" else ():
            names = override.value() if held["repo"].group_exists(override.key_or_group) else None
            if isinstance(names, list) and not all(isinstance(name, str) for name in names):
                return f"{override.input_line}: {_NO_OPTION}"
    else:
        return None
    override = getattr(held["override"], "input_line", held["override"])
    if "cfg" in held and isinstance(error, AssertionError | AttributeError):  # said of a section that is null
        parts = held["key"].split(".")
        for section in (".".join(parts[:count]) for count in range(1, len(parts) + isinstance(held["value"], dict))):
            if OmegaConf.select(held["cfg"], section) is None:
                return absent_section(section, held["key"])
    if "Config group override" in str(error):
        return f"{override}: {_NO_OPTION}"
    return f"{override}: {_reason(error)}"


def absent_section(section: str, key: str) -> str:
    """A line for a key of a section that is null here."""
    group, name = section.split(".", 1)[0], section.rpartition(".")[2]
    choose = f"logger={name}, or logger=[csv,{name}]" if group == "logger" else f"{group}= with one that has it"
    return f"{key}: {section} is not chosen, so it has no keys; choose {choose}"


def explain(error: BaseException) -> str:
    """One or two lines for an error of Hydra or OmegaConf: which key or option is wrong, and the nearest right one."""
    text, cause = str(error), error.__cause__ or error.__context__
    override = getattr(error, "override", None)  # Hydra's parser keeps the text it could not read

    if match := re.search(r"Could not (?:find|load) '([\w/]+)/([^/']*)'", text):
        group, name = match.groups()
        if name in _PLUGINS.get(group, ()):
            return f"{group}={name} is not installed: pip install 'mmprune-train[sweep]'"
        listed = re.findall(r"^\t(\S+)$", text, flags=re.M)  # Hydra's own list has what --config-dir adds
        return unknown_name(group, name, listed or options(group))
    if cause and (match := re.search(r"In '([^']+)': \w+ raised while composing config", text)):
        return f"{match.group(1)}.yaml: {_former_keys(error) or explain(cause)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        return (
            f"{key}=...: write it with a plus, +{key}=NAME"
            if key in _PLUS_GROUPS
            else unknown_key(key, _stages_of(cause))
        )
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"+{match.group(1)}: the key exists already; write it without the plus"
    if match := re.search(r"Multiple values for (\S+?)\.", text):
        return f"+{match.group(1)}=...: the group is chosen already; write it without the plus"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        remedy = "write a list as [a,b], a comma of a text as 'KEY=\"a,b\"', or add -m for a sweep over the values"
        return f"{match.group(1)}: ambiguous; {remedy}"
    if match := re.search(r"Sweep parameters '([^']+)' requires --multirun", text):
        return f"{match.group(1)}: a sweep needs -m (--multirun)"
    if match := re.search(r"Error merging override ([^=\s]+)=?(.*)", text):
        return f"{match.group(1)}={match.group(2)}: {_reason(cause)}"
    if match := re.search(r"Override (\S+) looks like a config group override", text):
        return unknown_key(match.group(1).lstrip("+~").split("=", 1)[0])
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match.group(1)} is not set; give it a value, {match.group(1)}=VALUE"
    if override:
        key, equals, value = str(override).partition("=")
        how = shlex.quote(f"{key}={quoted(value)}") if equals and key else "'KEY=\"VALUE\"'"
        return f"{override}: not readable as KEY=VALUE; put quotes around special characters: {how}"
    full_key = getattr(error, "full_key", None)
    if full_key and re.search(r"not in '|not in struct", text):
        return unknown_key(str(full_key), _stages_of(error))
    line = _first_line(text) or _reason(cause)
    return f"{full_key}: {line}" if full_key and str(full_key) not in line else line


def _former_keys(error: BaseException) -> str:
    """What keys of the file that Hydra broke at are called now; empty: they are called so."""
    from omegaconf import OmegaConf

    for frame, _ in traceback.walk_tb(error.__traceback__):
        loaded = frame.f_locals.get("loaded")
        if frame.f_globals.get("__name__", "").startswith("hydra.") and loaded is not None:
            return renamed(former_settings(cast("dict[str, Any]", OmegaConf.to_container(loaded.config))))
    return ""


def _reason(cause: BaseException | None) -> str:
    line = _first_line(str(cause))
    if "is not a ListConfig" in line:
        return "a list is needed, written [a,b]"
    if "dict is not a subclass of StageConfig" in line:
        return "a further training stage is written in a YAML file of the stage group (docs/stages.md)"
    return line or type(cause).__name__


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].strip()
