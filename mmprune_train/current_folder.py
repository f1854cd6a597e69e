"""The current folder on `sys.path`: it may be full of other people's files, so no library is ever taken from it.

Imports nothing that Python has not imported already: it is the first module of this package that runs.
"""

import os
import sys

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120  (pathlib is not imported yet)
"""What this package lies in. Of a checkout that is run in place nothing is left out: it is the project itself."""


def leave_out() -> None:
    """Take back what `python -m mmprune_train` has put before all libraries.

    Modules that Python imports to find this package come before: `python -P -m mmprune_train` and `mmprune` leave the
    folder out from the start.
    """
    asked = sys.argv[:1] == ["-m"] and any(word.endswith("mmprune_train") for word in sys.orig_argv)
    if asked and not sys.flags.safe_path and os.path.realpath(os.getcwd()) != HERE:  # noqa: PTH109
        del sys.path[0]


def leave_out_in_children() -> None:
    """The same for the processes that this one starts."""
    if os.path.realpath(os.getcwd()) != HERE:  # noqa: PTH109
        os.environ.setdefault("PYTHONSAFEPATH", "1")


def search_last() -> None:
    """Let the user's own modules be found there, behind all libraries."""
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109
        sys.path.append(here)
