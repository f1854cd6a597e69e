"""How figures are drawn and saved: without a display, and texts as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLAIN: Any = {
    **{"text.parse_math": False, "text.usetex": False, "axes.spines.top": False, "axes.spines.right": False},
    **{"legend.frameon": False, "legend.fontsize": 8},
}
"""Questions, settings and names may hold `$`: matplotlib would read a formula, and fail where it is none."""


@contextmanager
def style_of(settings: Any) -> Iterator[None]:
    """matplotlib with these settings, also as a decorator: on top of the user's own, but never of a file in the current
    folder, which may be somebody else's and names programs to start."""
    import matplotlib

    with matplotlib.rc_context():
        if Path(matplotlib.matplotlib_fname()).absolute().parent == Path.cwd():
            matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def save(figure: Any, title: str, path: Path, bottom: float = 0.0) -> None:
    """Title, arrange and write a figure; the format follows the ending. `bottom` is the share left free below."""
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.tight_layout(rect=(0, bottom, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
