"""Imports between this package's folders and modules run one way, the way that CONTRIBUTING.md tells."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import mmprune_train

ROOT = Path(mmprune_train.__file__).parent
GUIDE = ROOT.parent / "CONTRIBUTING.md"


def imported(file: Path) -> set[str]:
    """Folders and modules of this package that a file imports from, at its top, inside functions or for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {parts[1] for name in names if (parts := name.split("."))[0] == ROOT.name}


def graph() -> dict[str, set[str]]:
    """Folder, or module beside the folders, -> those that it imports from."""
    found: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT).parts[0].removesuffix(".py")
        found.setdefault(name, set()).update(imported(file) - {name})
    return found


def told() -> list[str]:
    """The chain of arrows in CONTRIBUTING.md, from the top."""
    (chain,) = re.findall(r"((?:`\w+`\s*->\s*)+`\w+`)", GUIDE.read_text(encoding="utf-8"))
    return re.findall(r"`(\w+)`", chain)


def test_there_is_no_cycle() -> None:
    assert set(TopologicalSorter(graph()).static_order()) == set(graph()), "graphlib raises CycleError for one"


def test_imports_follow_the_order_that_the_guide_tells() -> None:
    order = told()
    assert sorted(order) == sorted(graph()), "each stands there once"
    above = {
        (name, other) for name, others in graph().items() for other in others if order.index(other) < order.index(name)
    }
    assert not above
