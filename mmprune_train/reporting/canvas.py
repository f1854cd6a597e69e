"""Where figures of files are drawn: without a display, and texts as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

Arguments = ParamSpec("Arguments")

PLAIN: Any = {"text.parse_math": False, "text.usetex": False}
"""Questions, settings and names may hold `$`: matplotlib would read a formula, and fail where it is none."""


@contextmanager
def style_of(settings: Any) -> Iterator[None]:
    """matplotlib with these settings: on top of the user's own, but never of a file in the current folder, which may be
    somebody else's and names programs to start."""
    import matplotlib

    with matplotlib.rc_context():
        if Path(matplotlib.matplotlib_fname()).absolute().parent == Path.cwd():
            matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def drawn(draw: Callable[Concatenate[Any, Arguments], None]) -> Callable[Arguments, None]:
    """A function that draws with `matplotlib.pyplot`, which it gets first; imported when something is drawn."""

    @functools.wraps(draw)
    def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        with style_of(PLAIN):
            draw(plt, *args, **kwargs)

    return inside
