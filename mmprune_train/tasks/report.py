"""`task=report`: one HTML page over one or many runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mmprune_train.config.command import Command
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.reporting.page import Shown, compare, render
from mmprune_train.reporting.runs import DAMAGED, is_run, read_runs
from mmprune_train.reporting.tables import table
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.files import write_json
from mmprune_train.storage.locks import publishing


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Write report.html and result.json; returns what the latter holds."""
    folders = config.report.runs or [str(Path(config.runs_dir) / config.experiment_name)]
    if not config.report.runs and not Path(folders[0]).is_dir():
        raise UserError(
            f"report.runs is not given and {folders[0]} has no runs; give report.runs=[FOLDER,...] or +experiment=NAME"
        )
    runs = read_runs(folders)
    for found in runs:
        if found.state == DAMAGED:
            print(f"note: {found.name}: {'; '.join(found.missing)}", file=sys.stderr, flush=True)
    shown = shown_by(config)
    target = output_folder(config, folders)
    title = f"{Path(folders[0]).name}{f' and {len(folders) - 1} more' if len(folders) > 1 else ''}"
    page = render(runs, shown, f"Report: {title}", folders)
    compared = compare(runs, shown)
    result: dict[str, Any] = {
        "page": str(target / "report.html"),
        "runs": [
            {
                "name": found.name,
                "path": None if found.path is None else str(found.path),
                "state": found.state,
                "settings": {key: found.settings.get(key) for key in compared.keys},
                **values,
                "front": i in compared.front,
                "missing": found.missing,
                **({"error": found.job.error} if found.job and found.job.error else {}),
            }
            for i, (found, values) in enumerate(zip(runs, compared.values, strict=True))
        ],
    }
    with publishing(target):
        write_atomically(target / "report.html", page)
        write_json(target / "result.json", result)
    rows = [
        [f"{r['name']}{'*' if r['front'] else ''}", *r["settings"].values(), *(r[a] for a in shown.axes), r["state"]]
        for r in result["runs"]
    ]
    print(f"\n{table(rows, ['run', *compared.keys, *shown.axes, 'state'])}\n", flush=True)
    if compared.apart:
        print(f"note: {compared.apart}\n", flush=True)
    print(target / "report.html", flush=True)
    return result


def shown_by(config: Config) -> Shown:
    """The objectives, where nothing else is asked for."""
    settings, aims = config.report, dict(zip(config.sweep.objectives, config.sweep.directions, strict=True))
    y = settings.y or next(iter(aims))
    x = settings.x or next((name for name in reversed(aims) if name != y), None)
    up, right = (aims.get(name or "", usual_direction(name or "")) == "maximize" for name in (y, x))
    heat = (settings.heat[0], settings.heat[1]) if settings.heat else None
    return Shown(y, x, up, right, heat)


def usual_direction(name: str) -> str:
    """Of a number that is no objective, by its name; the page says what was taken."""
    less = any(word in name for word in COSTS) and not name.endswith("per_second")
    return "minimize" if less else "maximize"


COSTS = ("loss", "ratio", "seconds", "minutes", "tokens", "share", "overruns", "bytes")
"""What is rather small in the name of a number."""


def output_folder(config: Config, folders: list[str]) -> Path:
    """`report.output`; else `report` in the one folder, or in the experiment's."""
    if config.report.output is not None:
        target = Path(config.report.output).expanduser()
        if is_run(target):
            raise UserError(f"report.output={target} is a run directory, whose result.json would be lost; name another")
        return target.resolve() if target.is_symlink() else target
    alone = Path(folders[0]).expanduser()
    return (
        alone if len(folders) == 1 and alone.is_dir() else Path(config.runs_dir) / config.experiment_name
    ) / "report"
