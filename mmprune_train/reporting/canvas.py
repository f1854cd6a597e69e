"""Where figures of files are drawn: without a display, and texts as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

Arguments = ParamSpec("Arguments")

PLAIN: Any = {"text.parse_math": False}
"""Questions, settings and names may hold `$`: matplotlib would read a formula, and fail where it is none."""


def drawn(draw: Callable[Concatenate[Any, Arguments], None]) -> Callable[Arguments, None]:
    """A function that draws with `matplotlib.pyplot`, which it gets first; imported when something is drawn."""

    @functools.wraps(draw)
    def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        with matplotlib.rc_context(PLAIN):
            draw(plt, *args, **kwargs)

    return inside
