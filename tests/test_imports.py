"""Imports between this package's folders and modules run one way, the way that CONTRIBUTING.md tells."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import mmprune_train

ROOT = Path(mmprune_train.__file__).parent
MODULES = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
GUIDE = ROOT.parent / "CONTRIBUTING.md"


def imported(source: str) -> set[str]:
    """Folders and modules of this package that a file imports from, at its top, inside functions, for types alone or by
    `import_module("mmprune_train.x")`; of the package itself, `__init__`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=module, names=aliases, level=level):
                assert level == 0, "a relative import"
                names |= {f"{module}.{alias.name}" for alias in aliases}
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                names |= {name} if called in ("import_module", "__import__") else set()
    own = {name.partition(".")[2].partition(".")[0] for name in names if name.partition(".")[0] == ROOT.name}
    return {name if name in MODULES else "__init__" for name in own}


def test_an_import_in_any_form_is_seen() -> None:
    forms = (
        "import {}.model.llava",
        "from {} import model",
        "from {}.model import llava",
        "def f():\n from {}.model import x",
    )
    for form in (*forms, "importlib.import_module('{}.model.llava')", "__import__('{}.model')"):
        assert imported(form.format(ROOT.name)) == {"model"}, form
    assert imported(f"import {ROOT.name}") == imported(f"from {ROOT.name} import load_model") == {"__init__"}


def graph() -> dict[str, set[str]]:
    """Folder, or module beside the folders, -> those that it imports from."""
    found: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT).parts[0].removesuffix(".py")
        found.setdefault(name, set()).update(imported(file.read_text(encoding="utf-8")) - {name})
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
