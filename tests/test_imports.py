"""Imports between the package's folders run one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mmprune_train

ROOT = Path(mmprune_train.__file__).parent
LEVELS = (
    ("storage",),
    ("components",),
    ("config",),
    ("packed",),
    ("pruning",),
    ("data",),
    ("model",),
    ("features",),
    ("training", "evaluation", "reporting", "benchmark", "sweeps"),
    ("planning",),
    ("doctor",),
    ("tasks",),
)
"""From the bottom; folders of one level may import each other."""
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}


def imported(file: Path) -> set[str]:
    """Folders of this package that a module imports from, at its top or inside functions."""
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    names = [node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module]
    return {parts[1] for name in names if (parts := name.split("."))[0] == ROOT.name and len(parts) > 1}


def test_every_folder_has_a_level() -> None:
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(LEVEL)


@pytest.mark.parametrize("folder", LEVEL)
def test_a_folder_imports_nothing_from_above(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        above = sorted(name for name in imported(file) if LEVEL.get(name, 0) > LEVEL[folder])
        assert not above, f"{folder}/{file.name} imports {above}"
