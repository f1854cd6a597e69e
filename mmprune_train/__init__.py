"""mmprune_train: train multimodal LLMs with fewer visual tokens, the pruner in the loop."""

# Before any library, not even one of Python's: a file of that name in the current folder would be run in its place.
from mmprune_train.current_folder import leave_out  # isort: split

leave_out()

import os  # noqa: E402
import sys  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from mmprune_train.threads import spin_shortly  # noqa: E402

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmprune_train.model.build import load_model

__all__ = ["__version__", "load_model"]

spin_shortly(os.environ, sys.modules)


def __getattr__(name: str) -> Any:
    """`load_model` on first use, so that `import mmprune_train` and the command line's help need no torch."""
    if name == "load_model":
        from mmprune_train.model.build import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
