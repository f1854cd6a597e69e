"""The table that an evaluation ends with, as papers have it: on a terminal, as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmprune_train.reporting.tables import cell, table
from mmprune_train.reporting.text import KIND_NAMES

Cells = list[list[str]]
ESCAPES = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip
COSTS = {
    "visual_keep_ratio": "visual tokens kept",
    "keep_ratio": "tokens kept",
    "seconds": "s / question",
    "peak_gib": "GiB",
}
"""What a question takes, and what it is called; a column that is empty everywhere is left out."""


def columns(found: Mapping[str, Any]) -> tuple[list[str], Cells]:
    """Header and rows: a row a pruner, its scores in percent (points for MME) with their 95 % intervals, the average
    relative to dense, and what a question takes; then what is reached without looking."""
    told = found["table"]
    titles = list(dict.fromkeys(title for row in told for title in row["columns"]))
    units = {title: row["columns"][title]["unit"] for row in told for title in row["columns"]}
    wrong = {one["pruner"]: one for one in found["downsampling_wrong"]}
    header = ["pruner", *(KIND_NAMES.get(title, title) for title in titles)]
    rows = [[row["pruner"], *(_score(row["columns"].get(title)) for title in titles)] for row in told]
    if any(row["relative"] is not None for row in told):
        header.append("% of dense")
        for row, cells in zip(told, rows, strict=True):
            cells.append("-" if row["relative"] is None else f"{100 * row['relative']:.1f}")
    if wrong:
        header.append("where downsampling is wrong")
        for row, cells in zip(told, rows, strict=True):
            cells.append(_where_wrong(row, wrong))
    for key, text in COSTS.items():
        if any(row[key] is not None for row in told):
            header.append(text)
            for row, cells in zip(told, rows, strict=True):
                cells.append(cell(row[key]))
    for baseline in found["baselines"]:
        known = [_number(baseline["scores"].get(title), units[title]) for title in titles]
        rows.append([baseline["name"], *known, *[""] * (len(header) - 1 - len(titles))])
    return header, rows


def _score(told: Mapping[str, Any] | None) -> str:
    if told is None or told["score"] is None:
        return "-"
    text = _number(told["score"], told["unit"])
    if told["interval"] is None:
        return text
    low, high = (_number(end, told["unit"]) for end in told["interval"])
    return f"{text} [{low}, {high}]"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value * (1 if unit == 'points' else 100):.1f}"


def _where_wrong(row: Mapping[str, Any], wrong: Mapping[str, Any]) -> str:
    """Of the row's own downsampling, else of the only one."""
    label = row["beside"] or (next(iter(wrong)) if len(wrong) == 1 else None)
    if label is None or wrong[label]["scores"][row["pruner"]] is None:
        return "-"
    return f"{100 * wrong[label]['scores'][row['pruner']]:.1f} of {wrong[label]['questions']:,}"


def notes(found: Mapping[str, Any]) -> list[str]:
    """What was set for a budget, and each test against dense and against downsampling, a line each."""
    lines = []
    for row in found["table"]:
        if made := row["set_to"]:
            lines.append(
                f"{row['pruner']}: {made['setting']} (visual tokens kept: {made['target']:.3f} wanted, "
                f"{made['reached']:.3f} reached)"
            )
    asked = {row["pruner"]: row for row in found["table"]}
    first = found["first"]
    for test in found["tests"]:
        pair = {test["first"], test["second"]}
        beside = any(asked[label]["beside"] in pair - {label} for label in pair)
        if first not in pair and not beside:
            continue
        unit = asked[test["first"]]["columns"][test["column"]]["unit"]
        ends = test["interval"]
        within = "" if ends is None else f" [{', '.join(_signed(end, unit) for end in ends)}]"
        exact = "McNemar" if test["test"] == "mcnemar" else "paired bootstrap"
        title = KIND_NAMES.get(test["column"], test["column"])
        lines.append(
            f"{test['first']} - {test['second']}, {title}: {_signed(test['difference'], unit)}{within}, "
            f"p = {test['p']:.2g} ({exact}; {test['only_first']:,} right in the first alone, "
            f"{test['only_second']:,} in the second)"
        )
    return lines


def _signed(value: float, unit: str) -> str:
    return f"{value * (1 if unit == 'points' else 100):+.1f}"


def comparison_text(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    header, rows = columns(found)
    return "\n".join([table(rows, header, "Scores [95 % interval]"), *notes(found)])


def markdown(found: Mapping[str, Any]) -> str:
    header, rows = columns(found)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(one.replace('|', chr(92) + '|') for one in line)} |" for line in lines)
    told = [f"- {note}" for note in notes(found)]
    return "\n".join([text, *([""] if told else []), *told]) + "\n"


def latex(found: Mapping[str, Any]) -> str:
    """A tabular environment that needs no package."""
    header, rows = columns(found)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    body = [rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}", r"\hline", line(header), r"\hline", *map(line, rows)]
    return "\n".join([*body, r"\hline", r"\end{tabular}", *(f"% {note}" for note in notes(found))]) + "\n"


def escaped(text: str) -> str:
    """Text in which LaTeX sees no command. A bracket that opens a row would be an argument of the line break before."""
    text = re.sub(r"[\\~^&%$#_{}]", lambda found: ESCAPES[found[0]], text)
    return "{[}" + text[1:] if text.startswith("[") else text
