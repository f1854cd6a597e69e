"""Tables of several pruners: shares of dense, tests of every two, where downsampling is wrong, and their texts."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.evaluation.bring import bring, prunes
from mmprune_train.evaluation.comparison import COSTS, Row, comparison
from mmprune_train.evaluation.run import Measured
from mmprune_train.evaluation.significance import Scored
from mmprune_train.reporting.comparison import columns, comparison_text, escaped, latex, markdown


def row(label: str, open_: Sequence[float], points: float, dense: bool = False, beside: str | None = None) -> Row:
    kinds = {
        "open": Scored(["open"] * len(open_), [""] * len(open_), np.array(open_, float)),
        "M_M & E": Scored(["t"] * 2, ["", ""], np.ones(2), "total", lambda drawn: {"total": points}),
    }
    measured = Measured({}, kinds, {"blind": {"open": 0.25}} if dense else {}, [], lambda folder: None)
    costs = dict.fromkeys(COSTS, 0.5) | {"peak_gib": None}
    return Row(label, label.partition("@")[0], dense, measured, costs, beside=beside)


ROWS = [
    row("none", [1, 1, 1, 0], 1600, dense=True),
    row("a_b", [1, 1, 0, 0], 800, beside="downsample@7"),
    row("downsample@7", [1, 0, 0, 0], 400),
]


def test_the_average_is_of_each_columns_share_of_dense() -> None:
    found = comparison(ROWS)
    assert [told["relative"] for told in found["table"]] == [
        1,
        pytest.approx((2 / 3 + 1 / 2) / 2),
        pytest.approx(7 / 24),
    ]
    nothing = [row("none", [0] * 4, 1600, dense=True), row("a_b", [1, 1, 0, 0], 800)]
    assert [told["relative"] for told in comparison(nothing)["table"]] == [None, None], "a share of 0"
    assert [told["relative"] for told in comparison(ROWS[1:])["table"]] == [None, None], "no row is dense"


def test_every_two_rows_are_tested_on_every_column() -> None:
    tests = comparison(ROWS)["tests"]
    pairs = [(test["first"], test["second"]) for test in tests if test["column"] == "open"]
    assert pairs == [("a_b", "none"), ("downsample@7", "none"), ("downsample@7", "a_b")] and len(tests) == 6
    assert tests[0]["difference"] == -0.25 and (tests[0]["only_first"], tests[0]["only_second"]) == (0, 1)


def test_rows_are_told_apart_where_downsampling_is_wrong() -> None:
    (wrong,) = comparison(ROWS)["downsampling_wrong"]
    assert (wrong["pruner"], wrong["questions"], wrong["of"]) == ("downsample@7", 3, 6)
    assert wrong["scores"] == {"none": pytest.approx(2 / 3), "a_b": pytest.approx(1 / 3), "downsample@7": 0}


def test_where_downsampling_is_wrong_copies_count_once_and_what_has_no_image_not_at_all() -> None:
    def asked(label: str, scores: Sequence[float], beside: str | None = None) -> Row:
        kinds, groups = ["a", "a", "b", "b", "b"], ["same", "", "same", "turned", "turned"]
        column = Scored(kinds, groups, np.array(scores, float), seen=[True, False, True, True, True])
        measured = Measured({}, {"x": column}, {}, [], lambda folder: None)
        return Row(label, label, False, measured, dict.fromkeys(COSTS), beside=beside)

    rows = [asked("a_b", [0, 1, 0, 1, 1], beside="small"), asked("small", [0, 0, 0, 1, 0])]
    (wrong,) = comparison(rows)["downsampling_wrong"]
    assert (wrong["questions"], wrong["of"]) == (2, 2) and wrong["scores"] == {"a_b": 0.5, "small": 0}


def test_the_table_reads_the_same_in_all_three_forms(tmp_path: Path) -> None:
    found = comparison(ROWS)
    header, rows = columns(found)
    assert header[:5] == ["pruner", "open", "M_M & E", "% of dense", "where downsampling is wrong"]
    assert "GiB" not in header, "a column that is empty everywhere"
    assert rows[1][0] == "a_b" and rows[1][1].startswith("50.0 [") and rows[1][2] == "800.0 [800.0, 800.0]"
    assert rows[1][3:5] == ["58.3", "33.3 of 3"] and rows[3][:3] == ["blind", "25.0", "-"]
    text = comparison_text(found)
    assert "a_b - none, open: -25.0" in text and "(McNemar; 0 right in the first alone, 1 in the second)" in text
    table = [line for line in markdown(found).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in csv.reader(table, delimiter="|")]
    assert [line[1:-1] for line in cells if "---" not in line[1]] == [header, *rows]
    source = latex(found)
    assert r"a\_b" in source and r"M\_M \& E" in source and r"\% of dense" in source
    for line in source.splitlines():
        if line.endswith(r"\\"):
            assert line.replace(r"\&", "").count("&") == len(header) - 1
    if which("pdflatex"):
        (tmp_path / "t.tex").write_text(rf"\documentclass{{article}}\begin{{document}}{source}\end{{document}}")
        done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path)
        assert done.returncode == 0


def test_latex_sees_no_command() -> None:
    assert escaped(r"\input{x} 5% of $a_b^~#&") == (
        r"\textbackslash{}input\{x\} 5\% of \$a\_b\textasciicircum{}\textasciitilde{}\#\&"
    )
    assert escaped("[2ex]") == "{[}2ex]"


@pytest.mark.parametrize(
    ("name", "target", "key", "value"),
    [
        ("random", 0.25, "pruner.vision.knee.ratio", 0.25),
        ("fastv", 0.55, "pruner.language.knee.ratio", 0.4),
        ("sparsevlm", 0.55, "pruner.language.per_layer_budgets", [809, 294, 96]),
    ],
)
def test_a_pruner_is_brought_to_a_share_by_one_key(name: str, target: float, key: str, value: object) -> None:
    """On a model of 4 layers whose first one sees all of 1000 tokens."""

    def share(pruner: PrunerConfig) -> float:
        if pruner.vision.enabled:
            return pruner.vision.knee.ratio or 0
        counts = pruner.language.per_layer_budgets or [1000 * (pruner.language.knee.ratio or 0)] * 3
        return (1000 + sum(min(1000, count) for count in counts)) / 4000

    made = bring(load_pruner(name), target, share, 1000, "evaluate.budgets")
    assert abs(made.reached - target) <= 1e-3 and share(made.pruner) == made.reached and prunes(made.pruner)
    found, _, text = made.setting.partition("=")
    assert found == key and json.loads(text) == pytest.approx(value, rel=5e-3)


def test_a_share_that_cannot_be_met_is_refused() -> None:
    fastv = load_pruner("fastv")
    with pytest.raises(UserError, match="evaluate.budgets: pruner fastv keeps 0.25.* to 1 .*whatever its ratio.* 0.1"):
        bring(fastv, 0.1, lambda pruner: (1 + 3 * pruner.language.knee.ratio) / 4, 1000, "evaluate.budgets")
    otsu = load_pruner({"name": "twostage", "vision": {"knee": {"method": "otsu"}}})
    with pytest.raises(UserError, match="its otsu has no parameter"):
        bring(otsu, 0.1, lambda pruner: 1.0, 1000, "evaluate.budgets")
