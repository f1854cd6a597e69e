"""Docstrings read as Google's style: one argument a line, and of those that the function has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import mmprune_train

ROOT = Path(mmprune_train.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def arguments(text: str) -> list[str]:
    """The entries of a docstring's `Args:` section, as a parser of Google's style finds them."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.cleandoc(text) + "\n", re.MULTILINE)
    if section is None:
        assert "Args:" not in text.splitlines(), "an `Args:` section that no parser finds"
        return []
    return [line[4:] for line in section[1].splitlines() if re.match(r"    \S", line)]


def faults(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        makers = [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        spec = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else (makers[0] if makers else None)
        known = set() if spec is None else {one.arg for one in ast.walk(spec.args) if isinstance(one, ast.arg)}
        if isinstance(node, ast.ClassDef):
            known |= {
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
        for entry in arguments(ast.get_docstring(node, clean=False) or ""):
            name, colon, rest = entry.partition(":")
            several = [word for word in re.findall(r"(?<=[.;] )(\w+)(?=: )", rest) if word in known]
            if not colon or name.strip("*") not in known or several:
                found.append(f"{node.name}: {entry}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_each_argument_has_a_line_of_its_own(file: Path) -> None:
    assert faults(ast.parse(file.read_text(encoding="utf-8"))) == []


def test_what_a_parser_would_not_read_is_found() -> None:
    said = 'def f(a, b):\n    """F.\n\n    Args:\n        {}\n    """\n'
    assert faults(ast.parse(said.format("a: one.\n        b: two."))) == []
    for bad in ("a, b: both.", "a: one. b: two.", "c: none of it."):
        assert len(faults(ast.parse(said.format(bad)))) == 1
