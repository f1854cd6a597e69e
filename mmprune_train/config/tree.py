"""Settings as plain nested mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(tree: Any, key: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that is no mapping.

    Args:
        key: of the tree.
        lists: what is in lists, too, as `key[0]`.
    """
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name), lists)
    elif lists and isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from leaves(value, f"{key}[{place}]", lists)
    else:
        yield key, tree
