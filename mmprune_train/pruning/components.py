"""Parts of a pruner by name: the library's own, or a function of yours as `module:function`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping

from mmprune_train.errors import UserError
from mmprune_train.pruning.answers import Check, checked


def find_component(table: Mapping[str, Callable], name: str, key: str, check: Check) -> Callable:
    """The function called `name` in the library's `table`, or the one that `module:function` imports, then checked.

    Args:
        key: what the name was given for, e.g. `pruner.vision.score`; for the messages.
        check: what its answers must pass where it is the user's.
    Raises:
        UserError: no such name; the module cannot be imported or has no such function.
    """
    if ":" not in name:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{key}={name} is not known: {hint}available: {', '.join(sorted(table))}, or module:function"
            )
        return table[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if module != error.name and not module.startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise UserError(
            f"{key}={name}: there is no module {module}; run from the folder that holds {module.partition('.')[0]}, "
            "or put that folder on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UserError(f"{key}={name}: module {module} has no {function}") from error
    if not callable(found):
        raise UserError(f"{key}={name} is no function but a {type(found).__name__}")
    return checked(found, f"{key}={name}", check)
