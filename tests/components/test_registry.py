"""What components declare: read without running them, the only place that names them, and all that is told of them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mmprune_train import pruning
from mmprune_train.components import declare, registry
from mmprune_train.components.declare import KEYS, KINDS, REQUIRED, Component
from mmprune_train.components.registry import declared, default_of, find, library
from mmprune_train.components.source import read_imported
from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.storage.conf import options
from mmprune_train.usage import usage

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mmprune_train"
ALL = [one for components in library().values() for one in components.values()]
SCORE = "pruner.vision.score"


def without_functions(one: Component) -> Component:
    return dataclasses.replace(one, whole=one.whole and (one.whole[0], bool), calibrated=None)


@pytest.mark.parametrize("one", ALL, ids=lambda one: f"{one.kind}-{one.name}")
def test_what_is_read_of_the_source_is_what_is_imported(one: Component) -> None:
    module, _, function = one.place.partition(":")
    imported = read_imported(getattr(importlib.import_module(module), function), one.kind, one.name)
    assert without_functions(imported) == without_functions(one)
    for longest in (1, 9, 576) if one.calibrated else ():
        assert one.calibrated[1](longest) == imported.calibrated[1](longest)
    for name in (one.fixed, one.whole and one.whole[0], one.calibrated and one.calibrated[0]):
        assert not name or one.parameter(name) is not None
    assert one.doc and all(parameter.doc and parameter.default is not REQUIRED for parameter in one.parameters)
    assert all(parameter.type or parameter.choices for parameter in one.parameters)


def test_no_module_hides_a_decorator() -> None:
    """Importing `pruning/selection.py` would put the module where the decorator `selection` was."""
    for file in registry.LIBRARY.glob("[!_]*.py"):
        importlib.import_module(f"mmprune_train.pruning.{file.stem}")
    assert not [name for name in pruning.__all__ if isinstance(getattr(pruning, name), ModuleType)]
    for kind in KINDS:
        assert getattr(pruning, kind) is getattr(declare, kind)


def test_every_default_is_taken_by_one_component() -> None:
    taken = {one.default_for for one in ALL} - {""}
    assert taken == {key for key in KEYS if not key.endswith("merge")}
    assert default_of("knee.method") == "kneedle" and options("knee") == sorted(library()["budget"])


# ---------------------------------------------------------------------- one place


def constants(tree: ast.Module) -> Iterator[tuple[ast.Constant, list[ast.AST]]]:
    """Text constants but docstrings, each with the nodes around it, the innermost last."""

    def walk(node: ast.AST, around: list[ast.AST]) -> Iterator[tuple[ast.Constant, list[ast.AST]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Constant) and isinstance(child.value, str):
                if not isinstance(node, ast.Expr):
                    yield child, [*around, node]
            else:
                yield from walk(child, [*around, node])

    return walk(tree, [])


def of_another_key(around: list[ast.AST]) -> bool:
    """Whether a text is the value of a key that names no component: compared with such a field, a choice of such a key,
    or an argument of a drawing library."""
    names = {key.rpartition(".")[2] for key in KEYS}
    for node in around:
        match node:
            case ast.Compare(left=ast.Attribute(value=ast.Name(id="schedule"), attr="name")):
                return True
            case ast.AnnAssign(target=ast.Name(id=key), value=ast.Call(func=ast.Name(id="choice"))):
                return key not in names
            case ast.Subscript(value=ast.Attribute(attr="spines")) | ast.keyword(arg="gridspec_kw"):
                return True
    return False


ENGLISH = {"centres", "contextual", "nearest", "random", "recycle", "top"}
"""Names that messages have as words: only a text that is one of them and nothing else counts."""
HOMES: dict[str, set[str]] = {}
for _one in ALL:
    HOMES.setdefault(_one.name, set()).add(_one.place.partition(":")[0])


def named(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every component that a module names and does not define: as a text or a word of one, also in an
    f-string, but for docstrings and the examples of `--help`; outside of their folder as a function, too."""
    tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    for constant, around in constants(tree):
        if not of_another_key(around) and not constant.value.startswith("Examples:\n"):
            words = {constant.value, *(set(re.findall(r"\w+", constant.value)) - ENGLISH)}
            found += [(constant.lineno, word) for word in words]
    for node in ast.walk(tree) if not module.startswith("mmprune_train.pruning.") else ():
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)) if name not in ENGLISH:
                found.append((node.lineno, name))
            case ast.ImportFrom(module=str(origin), names=names) if origin.startswith("mmprune_train.pruning"):
                found += [(node.lineno, alias.name) for alias in names]
    return ((line, name) for line, name in found if module not in HOMES.get(name, {module}))


def test_no_other_file_names_a_component() -> None:
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        assert not list(named(module, file.read_text(encoding="utf-8"))), file


@pytest.mark.parametrize(
    "source",
    [
        "TABLE = {'kneedle': 1}",
        "TABLE = dict(kneedle=1)",
        "def f(method='kneedle'): ...",
        "match x:\n    case 'nearest': ...",
        "match x:\n    case {'a': 'top' | 'b'}: ...",
        "NAMES = 'iqr lof'.split()",
        "x == f'{key}=otsu'",
        "x.endswith('.cls_cosine')",
        "from mmprune_train.pruning.merging import nearest",
        "from mmprune_train.pruning import knees\nknees.menger",
        "x: Literal['dpp', 'other']",
    ],
)
def test_a_name_elsewhere_is_found(source: str) -> None:
    assert list(named("mmprune_train.model.flops", source))


PAGES = {
    **dict.fromkeys(("vision_score", "language_score"), "scores.md"),
    "budget": "budgets.md",
    **dict.fromkeys(("selection", "merge", "language_selection", "language_merge"), "methods.md"),
}


@pytest.mark.parametrize("one", ALL, ids=lambda one: f"{one.kind}-{one.name}")
def test_every_component_has_its_row_with_its_parameters_and_stands_in_the_help(one: Component) -> None:
    page = (ROOT / "docs" / PAGES[one.kind]).read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith((f"| `{one.name}` |", f"| `{one.name}` (default) |"))]
    assert any(all(f"`{parameter.name}`" in row for parameter in one.parameters) for row in rows), rows
    key = next(key for key, kind in KEYS.items() if kind == one.kind)
    assert one.name in usage().partition("Components (*")[2]
    told = usage([f"{key}={one.name}", "--help"])
    assert KINDS[one.kind].told in told and all(f"  {parameter}" in told for parameter in one.parameters)


# ---------------------------------------------------------------------- functions of one's own

MINE = '''
from typing import Annotated, Literal
from mmprune_train import pruning
from mmprune_train.pruning import Range, budget, vision_score

raise RuntimeError("this file is not to be run")


@vision_score(reads=("cls",), signed=True)
def edges(view, *, radius: Annotated[int, Range(1, 8)] = 2 * 3, mode: Literal["near", "far"] = "near", start: float):
    """Edges.

    Args:
        radius: how far
            away.
        start: where.
    """


@pruning.selection(exceeds=True)
def some(scores, counts, features, known=None, share: float | None = None, *, size=print("not to be run")):
    pass


def plain(curve, lengths, features, factor: float = 1.0, *, exact: bool = False):
    pass


@budget(fixed=unknown())
def strange(curve, lengths, *, level: int = 1):
    pass


@vision_score(reeds=("cls",))
def misspelt(view): ...


@vision_score(reads="cls")
def single(view): ...


@vision_score
def bare(view): ...
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("mine")
def test_a_file_of_ones_own_is_read_and_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    edges = find("vision_score", "mine:edges", SCORE)
    assert edges.needs == ["a CLS token"] and edges.signed and edges.own and edges.doc == "Edges."
    assert list(map(str, edges.parameters)) == ["radius: int = 6", "mode: near|far = near", "start: float"]
    assert [parameter.doc for parameter in edges.parameters] == ["how far away.", "", "where."]
    some = find("selection", "mine:some", "pruner.vision.selection")
    assert some.exceeds and some.takes == ("known",)
    assert list(map(str, some.parameters)) == ["share: float = null", "size: any = ..."]
    plain = find("budget", "mine:plain", "knee.method")
    assert plain.takes == plain.reads == ("features",) and not plain.declared
    assert list(map(str, plain.parameters)) == ["factor: float = 1.0", "exact: bool = False"]
    strange = find("budget", "mine:strange", "knee.method")
    assert strange.readable and not strange.declared and list(map(str, strange.parameters)) == ["level: int = 1"]
    for unreadable in ("mine:absent", "nowhere:at_all"):
        assert not find("budget", unreadable, "knee.method").readable
    with pytest.raises(UserError, match="mine:edges is declared as a stage-1 score; knee.method wants a budget"):
        find("budget", "mine:edges", "knee.method")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}.radus=3"], r"{}.radus=3: mine:edges has no parameter radus; did you mean radius\? .*mode: near|far"),
        (["{}.radius=9"], "{}.radius=9 must be at most 8"),
        (["{}.radius=2.5"], "{}.radius=2.5 must be a whole number"),
        (["{}.radius=true"], "{}.radius=True must be a whole number"),
        (["{}.start=wide"], "{}.start=wide must be a number"),
        (["{}.mode=fa"], r"{}.mode=fa must be one of near, far; did you mean far\?"),
        ([], "{}.start is not set, and mine:edges needs it"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_the_config(arguments: list[str], words: str) -> None:
    args = "pruner.vision.score_args"
    given = [f"{args}.start=1", *(argument.format(args) for argument in arguments)] if arguments else []
    with pytest.raises(UserError, match=words.format(args)):
        compose_config(["+experiment=smoke", f"{SCORE}=mine:edges", *given])


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine:misspelt", r"mine.py, line \d+: @vision_score\(reeds=...\): .*did you mean reads\?"),
        ("mine:single", r"reads=\('cls',\)"),
        ("mine:bare", r"@vision_score is written with brackets: @vision_score\(\)"),
        ("broken:part", r"broken.py, line 1: '\(' was never closed"),
    ],
)
def test_a_file_that_python_could_not_run_is_refused_by_the_config(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def part(view:\n    pass\n")
    with pytest.raises(UserError, match=f"{name}: .*{words}"):
        compose_config(["+experiment=smoke", f"{SCORE}={name}"])
    compose_config(["+experiment=smoke", f"{SCORE}={name}", "pruner.vision.enabled=false"])


@pytest.mark.parametrize("bare", [declare.vision_score, declare.merge])
def test_decorators_refuse_to_be_written_without_brackets(bare: object) -> None:
    with pytest.raises(UserError, match="brackets"):
        bare(lambda view: view)


@pytest.mark.usefixtures("mine")
def test_parameters_that_fit_are_taken_from_anywhere() -> None:
    config = compose_config(["+experiment=smoke", f"{SCORE}=mine:edges", "pruner.vision.score_args.start=1"])
    assert config.pruner.vision.score_args == {"start": 1}
    config = compose_config(["+experiment=smoke", "knee.method=mine:plain", "knee.args.exact=true", "knee.factor=2"])
    assert config.pruner.vision.knee.args == config.pruner.language.knee.args == {"exact": True}
    with pytest.raises(UserError, match=r"pruner.vision.knee.args.exakt=1: .* did you mean exact"):
        compose_config(["+experiment=smoke", "knee.method=mine:plain", "pruner.vision.knee.args.exakt=1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["knee=iqr", "knee.factor=2", "knee.args.factor=3"], "knee.factor=2.0 and knee.args.factor=3 are the same"),
        (["knee=iqr", "knee.args.ratio=0.5"], "knee.args.ratio=0.5: iqr has no parameter ratio"),
        (["knee=iqr", "knee.no_knee=sometimes"], "knee.no_knee=sometimes must be one of keep_all, max_chord"),
        (["pruner.vision.merge_args.count=3"], "is for a merge, and pruner.vision.merge=none"),
        (["pruner.vision.selection_args.share=0.5"], "top has no parameter share"),
    ],
)
def test_parameters_of_the_librarys_own_are_held_to_what_they_declare(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose_config(["+experiment=smoke", *arguments])


def test_a_budget_takes_the_groups_parameters_with_the_groups_method_alone() -> None:
    def knees(*arguments: str) -> list[dict]:
        pruner = compose_config(["+experiment=smoke", *arguments]).pruner
        return [pruner.vision.knee.args, pruner.language.knee.args]

    assert knees("knee=iqr", "knee.args.factor=3") == [{"factor": 3}] * 2
    assert knees("knee=iqr", "knee.args.factor=3", "pruner.vision.knee.args.factor=2") == [{"factor": 2}, {"factor": 3}]
    assert knees("knee=iqr", "knee.args.factor=3", "pruner.vision.knee.method=otsu") == [{}, {"factor": 3}]


# ---------------------------------------------------------------------- installed packages


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def bring(name: str, source: str) -> None:
        (tmp_path / "brought.py").write_text(f"from mmprune_train.pruning import selection, vision_score\n{source}")
        info = tmp_path / "my_methods-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = brought:part\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        declared.cache_clear()

    yield bring
    declared.cache_clear()


PART = "@{}()\ndef part(view, *, size: int = 3):\n    return view.patches.norm(dim=-1)\n"


def test_an_installed_package_brings_components_by_plain_name(install: object) -> None:
    install("sparkle", PART.format("vision_score"))
    assert find("vision_score", "sparkle", SCORE).package == "my-methods"
    assert "sparkle(size)" in usage() and "of package my-methods" in usage([f"{SCORE}=sparkle"])
    config = compose_config(["+experiment=smoke", f"{SCORE}=sparkle", "pruner.vision.score_args.size=4"])
    assert config.pruner.vision.score_args == {"size": 4}
    with pytest.raises(UserError, match="sparkel: there is no such option; did you mean sparkle"):
        find("vision_score", "sparkel", SCORE)


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("cls_cosine", PART.format("vision_score"), "my-methods: the library has a stage-1 score of that name"),
        ("sparkle", "def part(view): ...\n", "names no component.*decorated"),
        ("sparkle", "", "names no component"),
        ("sparkle", PART.format("vision_score").replace("()", "(reads=1 +)"), "my-methods: .*brought.py, line 2"),
    ],
)
def test_what_a_package_cannot_bring_is_refused(name: str, source: str, words: str, install: object) -> None:
    install(name, source)
    with pytest.raises(UserError, match=words):
        find("vision_score", "cls_attention", SCORE)
