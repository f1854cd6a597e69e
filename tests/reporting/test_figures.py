"""Texts of users in figures are texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmprune_train.reporting.bench_figure import draw_steps
from mmprune_train.reporting.budget_figure import draw_budgets
from mmprune_train.reporting.canvas import style_of
from mmprune_train.reporting.charts import lines, scatter
from mmprune_train.reporting.figures import PrunedImage, draw

SCORES = np.array([0.001, 0.3, 0.2, 9.0])


def inspected(text: str, path: Path) -> None:
    image = PrunedImage(np.zeros((8, 8, 3), np.uint8), 2, [0], [0], SCORES)
    draw([image], [(text, True)], text, path)


def benched(text: str, path: Path) -> None:
    draw_steps({text: {"vision": 1.0, "step": 1.0}}, list("abcde"), {text: (1.0, 1.0, 1.0)}, text, path)


def calibrated(text: str, path: Path) -> None:
    draw_budgets({text: (np.array([1, 3]), None)}, text, np.stack([SCORES, SCORES]), 2.0, text, text, path)


@pytest.mark.parametrize("text", [r"$\frac{$", "$x_1$ and $", "100 % {} \\ ^_"])
@pytest.mark.parametrize("drawn", [inspected, benched, calibrated])
def test_a_picture_shows_any_text(drawn: Callable[[str, Path], None], text: str, tmp_path: Path) -> None:
    drawn(text, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


@pytest.mark.parametrize("text", [r"$\frac{$", "$x_1$"])
def test_a_chart_shows_any_text_as_it_is(text: str) -> None:
    two = {text: ([1, 2], [1, 2]), "other": ([1, 2], [2, 1])}
    for chart in (lines(two, text, text), scatter([(1, 2)], [text], ["#a"], [0], text, text)):
        assert chart.count(f">{text}<") == 3


@pytest.mark.parametrize("setting", ["text.usetex: True", "figure.dpi: 1", "font.family: evil"])
def test_a_style_in_the_current_folder_is_not_taken(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    before = matplotlib.rcParams[setting.split(":")[0]]
    (tmp_path / "matplotlibrc").write_text(f"{setting}\n")
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):  # as matplotlib reads it when it is imported
        assert matplotlib.rcParams[setting.split(":")[0]] != before
        with style_of({"lines.linewidth": 7}):
            assert matplotlib.rcParams["lines.linewidth"] == 7
            assert matplotlib.rcParams[setting.split(":")[0]] == before
