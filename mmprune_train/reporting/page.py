"""The report of one or many runs as one HTML page that needs nothing beside it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmprune_train.config.renamed import present_name
from mmprune_train.errors import UserError
from mmprune_train.progress import progress
from mmprune_train.reporting import charts
from mmprune_train.reporting.results import front, numbers, pick, picked
from mmprune_train.reporting.runs import Run, telling_keys
from mmprune_train.reporting.sweeps import varying
from mmprune_train.reporting.tables import cell
from mmprune_train.reporting.text import ACCURACIES, accuracies, asked_apart, asked_text, stage_rows

HIGHLIGHTED = 6
"""Most runs whose loss is drawn in colour where all runs are in one figure."""

LONGEST = 40
"""Most characters of a run's label in a figure."""

TOKENS = {"tokens_dense": "dense", "tokens_stage1": "stage 1", "tokens_stage2": "stage 2", "tokens_layer_mean": "mean"}


@dataclass
class Shown:
    """What a report compares runs by."""

    y: str
    """Number that runs are ordered by, by the names of `reporting.results.pick`."""
    x: str | None
    maximize_y: bool = True
    maximize_x: bool = False
    heat: tuple[str, str] | None = None
    """Rows and columns of the heat map; None: the first two settings that vary, `seed` only for want of another."""

    @property
    def axes(self) -> list[str]:
        return [self.y, *([self.x] if self.x else [])]

    @property
    def directions(self) -> list[str]:
        better = [self.maximize_y, self.maximize_x][: len(self.axes)]
        return ["maximize" if more else "minimize" for more in better]


@dataclass
class Compared:
    """The runs beside each other."""

    keys: list[str]
    """Settings that tell them apart."""
    differ: list[str]
    """All settings that differ."""
    values: list[dict[str, float | None]]
    """By run: the numbers of `Shown.axes`; None: the run has none."""
    front: list[int]
    """Indices of the runs that no other beats."""
    apart: str
    """What the runs were asked, where that differs; else empty."""


def compare(runs: Sequence[Run], shown: Shown) -> Compared:
    """Raises UserError where no run has a number that is asked for."""
    values = [{name: picked(run.numbers, name) for name in shown.axes} for run in runs]
    for name in shown.axes:
        if any(run.numbers for run in runs) and all(value[name] is None for value in values):
            pick(next(run.numbers for run in runs if run.numbers), name)  # says what there is instead
    full = [i for i, value in enumerate(values) if runs[i].state == "done" and None not in value.values()]
    points = [[values[i][name] or 0.0 for name in shown.axes] for i in full]
    differ = varying([run.settings for run in runs])
    apart = asked_apart({run.name: run.result.get("evaluate") or {} for run in runs})
    return Compared(telling_keys(runs), differ, values, [full[i] for i in front(points, shown.directions)], apart)


def render(runs: Sequence[Run], shown: Shown, title: str, sources: Sequence[str]) -> str:
    """The page.

    Args:
        sources: folders they were read from, for the page to say.
    """
    compared = compare(runs, shown)
    order = _order(runs, compared, shown)
    states = Counter(run.state for run in runs).items()
    loader = PackageLoader("mmprune_train.reporting")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M"),
        sources=sources,
        counts=f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(f'{count} {state}' for state, count in states)}",
        beside=_beside(runs, compared, shown, order) if len(runs) > 1 else None,
        sections=[_section(runs[i], f"run-{i}", compared) for i in progress(order, "report", "runs", lines=5)],
        svg=Markup,
    )


def _order(runs: Sequence[Run], compared: Compared, shown: Shown) -> list[int]:
    """Best first; runs without the number, and failed ones, last."""

    def place(i: int) -> tuple[bool, float]:
        value = compared.values[i][shown.y]
        return (True, 0.0) if value is None else (False, -value if shown.maximize_y else value)

    return sorted(range(len(runs)), key=place)


# -- all runs --------------------------------------------------------------------------------------------------------


def _beside(runs: Sequence[Run], compared: Compared, shown: Shown, order: Sequence[int]) -> dict[str, Any]:
    """What the page says of all runs together."""
    better = ["more" if direction == "maximize" else "less" for direction in shown.directions]
    return {
        "directions": [f"{name}: {word} is better" for name, word in zip(shown.axes, better, strict=True)],
        "table": _table(runs, compared, shown, order),
        "apart": compared.apart,
        "troubled": [(run, f"run-{i}") for i, run in enumerate(runs) if run.state != "done"],
        "heat": _heat(runs, compared, shown),
        "scatter": _scatter(runs, compared, shown),
        "losses": _losses(runs, compared, order),
    }


def _table(runs: Sequence[Run], compared: Compared, shown: Shown, order: Sequence[int]) -> dict[str, Any]:
    more = [_more_numbers(run) for run in runs]
    names = dict.fromkeys(name for found in more for name in found)
    further = sorted(names, key=lambda name: not name.startswith("accuracy."))
    columns = [*compared.keys, *shown.axes, *further]
    rows = []
    for i in order:
        run = runs[i]
        found: dict[str, Any] = {**more[i], **compared.values[i]}
        cells = [run.settings.get(name) for name in compared.keys]
        cells += [found.get(name) for name in columns[len(cells) :]]
        texts = [cell(value) for value in cells]
        best = i in compared.front
        rows.append({"name": run.name, "anchor": f"run-{i}", "state": run.state, "best": best, "cells": texts})
    sorted_by = "descending" if shown.maximize_y else "ascending"
    headings = [
        {"name": name, "number": place >= len(compared.keys), "sorted": sorted_by if name == shown.y else "none"}
        for place, name in enumerate(columns)
    ]
    return {"columns": headings, "rows": rows}


def _more_numbers(run: Run) -> dict[str, float]:
    """Accuracies by kind, and of training what the last stage reached and what all took."""
    accuracies = [key for key in run.numbers if key.startswith("evaluate.accuracy.")]
    found = {key.removeprefix("evaluate."): run.numbers[key] for key in accuracies}
    stages = list((run.result.get("stages") or {}).values())
    for key, name in (("loss", "loss"), ("step_seconds", "s/step")):
        if stages and stages[-1].get(key) is not None:
            found[name] = stages[-1][key]
    if minutes := [stage["train_minutes"] for stage in stages if "train_minutes" in stage]:
        found["training min"] = sum(minutes)
    return found


def _scatter(runs: Sequence[Run], compared: Compared, shown: Shown) -> dict[str, Any]:
    if shown.x is None:
        return {"svg": None, "why": "there is one objective only; report.x= names a second number"}
    full = [i for i in range(len(runs)) if None not in compared.values[i].values()]
    if not full:
        return {"svg": None, "why": f"no run has both {shown.y} and {shown.x}"}
    svg = charts.scatter(
        [(compared.values[i][shown.x] or 0.0, compared.values[i][shown.y] or 0.0) for i in full],
        [_short(runs[i], compared.keys) for i in full],
        [f"#run-{i}" for i in full],
        [full.index(i) for i in compared.front],
        shown.x,
        shown.y,
    )
    left = len(runs) - len(full)
    return {
        "svg": svg,
        "why": f"{left} of {len(runs)} runs lack one of the two numbers and are not drawn" if left else "",
    }


def _label(run: Run, keys: Sequence[str]) -> str:
    """The settings that tell it from the others: names as they are, numbers and switches with the end of their key."""
    said = {key: run.settings[key] for key in keys if key in run.settings}
    return ", ".join(v if _is_name(v) else f"{_ending(k, keys)} {v}" for k, v in said.items()) or run.name


def _short(run: Run, keys: Sequence[str]) -> str:
    """The label, or where a figure has no room for it the run's name."""
    label = _label(run, keys)
    return label if len(label) <= LONGEST else run.name


def _is_name(value: str) -> bool:
    return value[:1].isalpha() and value.lower() not in ("true", "false", "null", "none")


def _ending(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other key has."""
    parts = key.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def _heat(runs: Sequence[Run], compared: Compared, shown: Shown) -> dict[str, Any]:
    """Means of y over the runs of each pair of values, as cells with a shade from 0 to 100."""
    keys = shown.heat or tuple(sorted(compared.keys, key="seed".__eq__)[:2])
    for key in shown.heat or ():
        if not any(key in run.settings for run in runs):
            differ = f"no run has a setting {key}; they differ in {', '.join(compared.keys)}"
            raise UserError(f"report.heat: {present_name(key) or differ}")
    if len(keys) < 2:
        return {"rows": [], "why": "fewer than two settings differ"}
    groups: dict[tuple[str, str], list[float]] = {}
    for run, value in zip(runs, compared.values, strict=True):
        if (y := value[shown.y]) is not None:
            groups.setdefault((run.settings.get(keys[0], "-"), run.settings.get(keys[1], "-")), []).append(y)
    if not groups:
        return {"rows": [], "why": f"no run has {shown.y}"}
    means = {pair: fmean(values) for pair, values in groups.items()}
    low, high = min(means.values()), max(means.values())
    along = _values(runs, keys[1])
    rows = []
    for name in _values(runs, keys[0]):
        cells = []
        for column in along:
            mean = means.get((name, column))
            shade = None if mean is None else round(100 * (mean - low) / (high - low)) if high > low else 50
            cells.append({"text": cell(mean), "shade": shade, "runs": len(groups.get((name, column), []))})
        rows.append({"name": name, "cells": cells})
    several = max(map(len, groups.values()))
    others = [key for key in compared.keys if key not in keys]
    why = f"means over up to {several} runs that differ in {', '.join(others)}" if several > 1 else ""
    return {"rows": rows, "along": along, "keys": keys, "of": shown.y, "why": why}


def _values(runs: Sequence[Run], key: str) -> list[str]:
    """Values of a setting, numbers in their order."""
    found = list(dict.fromkeys(run.settings.get(key, "-") for run in runs))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def _losses(runs: Sequence[Run], compared: Compared, order: Sequence[int]) -> list[dict[str, Any]]:
    """One figure a stage: the best runs in colour, the others grey."""
    figures = []
    for stage in dict.fromkeys(name for run in runs for name in run.metrics):
        drawn = [i for i in order if runs[i].metrics.get(stage)]
        ranked = sorted(drawn, key=lambda i: i not in compared.front)
        labels = [_short(runs[i], compared.keys) for i in ranked]
        names = [label if labels.count(label) == 1 else runs[i].name for i, label in zip(ranked, labels, strict=True)]
        series = {name: _steps(runs[i], stage, "loss") for i, name in zip(ranked, names, strict=True)}
        if series:
            faded = list(series)[HIGHLIGHTED:]
            svg = charts.lines(series, "step", f"loss, {stage}", size=(6.6, 3.0), faded=faded)
            figures.append({"svg": svg, "note": f"in grey: {len(faded)} more runs" if faded else ""})
    return figures


# -- one run ---------------------------------------------------------------------------------------------------------


def _section(run: Run, anchor: str, compared: Compared) -> dict[str, Any]:
    stages = run.manifest.get("stages", {})
    facts = {
        "folder": run.path,
        "experiment": run.manifest.get("experiment"),
        "made": run.manifest.get("created"),
        "seed": run.manifest.get("seed"),
        "commit": run.manifest.get("git_commit"),
        "overrides": " ".join(run.job.overrides) if run.job else None,
    }
    return {
        "run": run,
        "anchor": anchor,
        "facts": {name: value for name, value in facts.items() if value is not None},
        "told": [f"{key}={run.settings[key]}" for key in compared.keys if key in run.settings],
        "settings": {key: run.settings[key] for key in (compared.differ or run.settings) if key in run.settings},
        "whole": not compared.differ,
        "stages": list(stages),
        "stage_rows": [[text, *map(cell, values)] for text, *values in stage_rows(stages)],
        "charts": run_charts(run),
        "evaluations": [
            {"name": name, **_evaluation(result)}
            for name, result in [("after training", run.result.get("evaluate")), *run.evaluations.items()]
            if result
        ],
        "error": run.job.error if run.job else None,
    }


def run_charts(run: Run) -> list[str]:
    """Small figures of a run's metrics, a line a stage; tokens a figure a stage."""
    stages = [name for name, rows in run.metrics.items() if rows]
    panels = (
        ("loss", "loss", None),
        ("grad_norm", "gradient norm", None),
        ("keep_ratio", "keep ratio", None),
        ("step_seconds", "seconds a step", None),
        ("mfu", "MFU", None),
        ("data_seconds", "share waiting for data", "step_seconds"),
    )
    drawn = []
    for key, label, per in panels:
        series = {name: _steps(run, name, key, per) for name in stages if key in run.metrics[name][0]}
        if series:
            drawn.append(charts.lines(series, "step", label))
    for name in stages:
        keys = [key for key in TOKENS if key in run.metrics[name][0]]
        if series := {TOKENS[key]: _steps(run, name, key, "samples") for key in keys}:
            drawn.append(charts.lines(series, f"step of {name}", "tokens a sample"))
    return drawn


def _steps(run: Run, stage: str, key: str, per: str | None = None) -> charts.Line:
    """A metric by step; with `per` divided by another."""
    rows = [row for row in run.metrics[stage] if row[key] is not None]  # the loss of a step that was not applied
    return [row["step"] for row in rows], [row[key] / row[per] if per else row[key] for row in rows]


def _evaluation(result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies by kind, then every other number, as rows of texts."""
    kinds, rows = accuracies(result)
    told = [[key, cell(value)] for key, value in numbers(result).items() if key.split(".")[0] not in ACCURACIES]
    if asked := result.get("asked"):
        told = [["asked", asked_text(result)], ["of", asked["annotations"]], *told]
    return {"kinds": kinds, "rows": [[text, *map(cell, values)] for text, *values in rows], "others": told}
