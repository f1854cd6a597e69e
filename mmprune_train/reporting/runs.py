"""What run directories and sweep directories hold, read for a report; what is missing is said, not guessed."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mmprune_train.config.identity import NOT_DECISIVE
from mmprune_train.config.in_effect import in_effect
from mmprune_train.config.renamed import upgraded
from mmprune_train.config.typed import as_typed
from mmprune_train.errors import UserError
from mmprune_train.reporting.results import numbers
from mmprune_train.reporting.sweeps import JobRecord, read_records, varying
from mmprune_train.reporting.text import asked_apart
from mmprune_train.storage.files import PUT_BACK, damaged, read_yaml, rows_of
from mmprune_train.storage.run_files import METRICS, MISSHAPEN, read_manifest, read_result, rows_fault, rows_written

HIDDEN = frozenset(NOT_DECISIVE - {"knee", "stages", "data.evaluate"}) | {"data.how_to_get", "data.root"}
"""Settings that do not tell runs apart."""
CHOICES: dict[str, tuple[str, ...]] = {
    group: (f"{group}.name",) for group in ("encoder", "llm", "projector", "peft", "data", "strategy")
}
CHOICES |= {"pruner": ("pruner.name", "knee.method"), "knee": ("knee.method",)}
"""Config group -> the settings that say which of its options were chosen, and with them what the options set."""


DAMAGED = "damaged"
"""State of a run of which something cannot be read, whatever it has come to."""


@dataclass
class Run:
    """One run directory, or a job of a sweep that did not come so far."""

    name: str
    path: Path | None
    state: str
    """As a job's: `done`, `failed`, `interrupted` or `unfinished`; or `damaged`."""
    settings: dict[str, str] = field(default_factory=dict)
    """Dotted key -> value: of config.yaml, or for a job of a sweep its overrides."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Of result.json, by dotted key."""
    result: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Stage -> rows of metrics.jsonl."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Folder -> its result.json: evaluations apart from the run's own."""
    job: JobRecord | None = None
    missing: list[str] = field(default_factory=list)
    """What the run does not have, a sentence each."""


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs of run directories, sweep directories, folders that hold runs, and globs of all these.

    Raises UserError for a folder that is not there, or holds none of these.
    """
    paths: dict[Path, str | Path] = {}
    for folder in folders:
        here = sorted(glob.glob(str(Path(folder).expanduser())))  # noqa: PTH207
        if not here:
            raise UserError(f"report.runs: there is no {folder}; name a run, a sweep directory, or a folder of runs")
        paths |= dict.fromkeys(map(Path, here), folder)
    found: dict[Any, Run] = {}
    for folder in folders:
        read = [run for path in paths if paths[path] == folder for run in _read_folder(path, alone=len(paths) == 1)]
        if not read:
            raise UserError(
                f"report.runs: {folder} holds no run (a folder with a manifest.json) and no sweep (with a sweep.json)"
            )
        found |= {run.path if run.path and len(paths) > 1 else run.name: run for run in read}
    return list(found.values())


def _read_folder(path: Path, alone: bool) -> list[Run]:
    if is_run(path):
        return [read_run(path)]
    if (path / "sweep.json").is_file():
        return read_sweep(path, alone)
    inside = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    return [read_run(child) for child in inside if is_run(child) and ".old" not in child.name]


def is_run(path: Path) -> bool:
    return (path / "manifest.json").is_file() and (path / "config.yaml").is_file()


def read_sweep(path: Path, alone: bool = True) -> list[Run]:
    """One Run a job, in the order of the jobs.

    Args:
        alone: whether nothing else is shown: jobs are then told apart by their overrides, else, where they have one, by
            their run's config, as the runs beside them.
    """
    runs, faults = list[Run](), dict[str, str]()
    for record in read_records(path, faults):
        where = None if record.run is None else path / record.run
        if where is not None and is_run(where):
            run = read_run(where)
        else:
            run = Run(f"{path.name}, job {record.job}", None, record.state, missing=["no run directory"])
        if alone:
            run.name = f"job {record.job}{f' ({run.path.name})' if run.path else ''}"
        if alone or run.path is None:
            run.settings = record.settings
        run.state, run.job = record.state, record
        run.numbers = record.numbers or run.numbers
        runs.append(run)
    return runs + [Run(f"{path.name}, {job}", None, DAMAGED, missing=[fault]) for job, fault in faults.items()]


def read_run(path: Path) -> Run:
    """A run directory as far as it has come. What is damaged in it is among what is missing."""
    run = Run(name=path.name, path=path.resolve(), state="unfinished")
    run.settings = _whole(run, lambda: _flat(in_effect(upgraded(yaml.safe_load(read_yaml(path / "config.yaml"))))), {})
    run.manifest = _whole(run, lambda: read_manifest(path) or {}, {})
    run.result = _whole(run, lambda: read_result(path / "result.json", _usable) or {}, {})
    run.numbers = numbers(run.result)
    for found in sorted(path.glob("evaluate*/result.json")):
        evaluation = _whole(run, partial(read_result, found, _usable_evaluation), None)
        if not evaluation or not {"benchmarks", "pruners"}.isdisjoint(evaluation):  # told where they are made
            continue
        if ".old" not in found.parent.name and evaluation != run.result.get("evaluate"):
            run.evaluations[found.parent.name] = evaluation
    stages = run.manifest.get("stages", {})
    for name in stages:
        run.metrics[name] = _whole(run, partial(_rows, path / name), [])
    if run.missing:
        run.state = DAMAGED
        return run
    if not stages:
        run.missing.append("no training stage was begun")
    for name, stage in stages.items():
        if stage.get("state") != "done":
            run.missing.append(
                f"stage {name} has not ended: {len(run.metrics[name])} of {stage.get('steps', '?')} steps"
            )
        elif not run.metrics[name]:
            run.missing.append(f"stage {name} has no metrics.jsonl")
    if not run.result:
        run.missing.append("no result.json: the run has not ended")
        return run
    run.state = "done"
    if "evaluate" not in run.result:
        run.missing.append("no evaluation after training (evaluate.after_train, data.evaluate.annotations)")
    return run


def _whole(run: Run, read: Callable[[], Any], otherwise: Any) -> Any:
    """What `read` gives; `otherwise` where it finds damage, which the run then tells."""
    try:
        return read()
    except (yaml.YAMLError, RecursionError, *MISSHAPEN) as error:
        run.missing.append(" ".join(str(error).split()))
        return otherwise


def _rows(stage: Path) -> list[dict[str, Any]]:
    """Rows of a stage's metrics.jsonl, each with all numbers of the first."""
    file = stage / METRICS
    rows = list(rows_of(file))
    if fault := rows_fault(file, rows_written(stage)):
        raise UserError(f"{stage}: {fault}; {PUT_BACK}")
    for number, row in enumerate(rows, 1):
        if lost := [key for key in ("step", *rows[0]) if not isinstance(row.get(key, ""), int | float | None)]:
            raise damaged(file, f"line {number} has no number {lost[0]}", PUT_BACK)
    return rows


def _usable(result: dict[str, Any]) -> None:
    """Raise one of MISSHAPEN where no page could be made of the result of a run."""
    for stage in result.get("stages", {}).values():
        stage.get("loss")
    _usable_evaluation(result.get("evaluate", {}))


def _usable_evaluation(result: dict[str, Any]) -> None:
    numbers(result)
    if "benchmarks" in result:
        return
    for name in ("accuracy", "blind_majority", "accuracy_blank"):
        result.get(name, {}).get("")
    if "asked" in result:
        asked_apart({"": result})


def telling_keys(runs: Sequence[Run]) -> list[str]:
    """Settings that tell the runs apart: those that vary, without those of a group that go with its chosen option."""
    keys = varying([run.settings for run in runs])
    values = {key: [run.settings.get(key) for run in runs] for key in keys}

    def goes_with(key: str) -> bool:
        group, _, rest = key.partition(".")
        options = [values[name] for name in CHOICES.get(group, ()) if name in values and name != key]
        chosen = list(zip(*options, strict=True))
        return bool(rest and options) and len(set(zip(chosen, values[key], strict=True))) == len(set(chosen))

    return [key for key in keys if not goes_with(key)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in HIDDEN:
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = as_typed(value)
    return found
