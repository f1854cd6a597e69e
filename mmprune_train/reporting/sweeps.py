"""What a sweep directory says: one record a job in `jobs/`, and `sweep.json` and `sweep.csv` over all of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmprune_train.config.identity import STARTED_OVER
from mmprune_train.config.renamed import present_override
from mmprune_train.errors import UserError
from mmprune_train.reporting.results import front
from mmprune_train.reporting.tables import table
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.files import damaged, read_json, write_json
from mmprune_train.storage.run_files import MISSHAPEN

STATES = ("done", "failed", "interrupted", "unfinished")
"""`unfinished`: no end was recorded, so the job runs still, or was killed."""


SWEEP = "sweep.json"


def read_settings(sweep: Path) -> dict[str, Any]:
    """What a sweep was asked, from its sweep.json. Raises UserError where that is damaged."""
    return read_json(sweep / SWEEP, "start the sweep again, which writes it anew") or {}


@dataclass
class JobRecord:
    """One job. Kept by its overrides, so that the same job of a continued sweep takes its earlier record's place."""

    job: int
    """Hydra's number, counted on where a study is continued."""
    overrides: list[str]
    state: str = "unfinished"
    run: str | None = None
    """Run directory, as seen from the sweep directory; None: the config did not come so far."""
    started: str = ""
    seconds: float | None = None
    objectives: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    """Every number of the result, by dotted key."""
    error: str | None = None
    """One line."""
    mistake: bool = False
    """Whether the error is the user's input's."""
    note: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """Key -> value of the overrides."""
        pairs = (override.lstrip("+~").partition("=") for override in self.overrides)
        return {key: value for key, _, value in pairs}

    def only(self, keys: Sequence[str]) -> str:
        """The overrides of these keys; all where none of them is given."""
        return " ".join(f"{k}={v}" for k, v in self.settings.items() if k in keys) or " ".join(self.overrides)

    def write(self, sweep: Path) -> None:
        asked = sorted(override for override in self.overrides if override.lstrip("+").lower() not in STARTED_OVER)
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        write_json(sweep / "jobs" / f"{name}.json", asdict(self), checked=True)

    @classmethod
    def read(cls, path: Path) -> JobRecord:
        """Raises UserError where the record is damaged, or none."""
        remedy = "put an earlier copy back, or delete it: the same job of the sweep writes it again"
        found = read_json(path, remedy) or {}
        try:
            record = cls(**found)
            record.overrides = [present_override(one) or one for one in record.overrides]
            if type(record.job) is not int or record.state not in STATES:
                raise ValueError("its job is no number, or its state unknown")
            record.settings.keys(), record.numbers.keys(), record.objectives.keys()
        except MISSHAPEN as error:
            raise damaged(path, f"it is no record of a job ({error})", remedy) from None
        return record


def read_records(sweep: Path, faults: dict[str, str] | None = None) -> list[JobRecord]:
    """All records, in the order of the jobs.

    Args:
        faults: gets what is wrong with those that are damaged, by their files; None: the first is a UserError.
    """
    found = []
    for path in sorted((sweep / "jobs").glob("*.json")):
        try:
            found.append(JobRecord.read(path))
        except UserError as error:
            if faults is None:
                raise
            faults[path.name] = str(error)
    return sorted(found, key=lambda record: (record.job, record.started))


def relative(path: Path, start: Path) -> str:
    """`path` as seen from `start`, so that a copied tree of runs still finds itself."""
    return os.path.relpath(path.resolve(), start.resolve())


def varying(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that do not have the same value in all jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job)
    return [key for key in keys if len({job.get(key) for job in jobs}) > 1]


def write_summary(sweep: Path, settings: Mapping[str, Any], records: Sequence[JobRecord]) -> None:
    """sweep.json and sweep.csv.

    Args:
        settings: what was asked; `objectives` and `directions` among it.
    """
    names = list(settings["objectives"])
    keys = varying([record.settings for record in records])
    best = pareto(records, names, settings["directions"])
    jobs = [asdict(record) | {"front": record in best} for record in records]
    write_json(sweep / SWEEP, {**settings, "varies": keys, "jobs": jobs}, checked=True)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["job", *keys, *names, "front", "state", "seconds", "run", "error"])
    for record in records:
        values = [record.objectives.get(name) for name in names]
        where = None if record.run is None else os.path.normpath(sweep / record.run)
        writer.writerow(
            [record.job, *(record.settings.get(key) for key in keys), *values, int(record in best), record.state,
             record.seconds, where, record.error]
        )  # fmt: skip
    write_atomically(sweep / "sweep.csv", text.getvalue())


def pareto(records: Sequence[JobRecord], names: Sequence[str], directions: Sequence[str]) -> list[JobRecord]:
    """Finished jobs with all objectives that no other job beats, the best by the first objective first."""
    usable = [r for r in records if r.state == "done" and all(name in r.objectives for name in names)]
    points = [[record.objectives[name] for name in names] for record in usable]
    best = [usable[i] for i in front(points, directions)]
    return sorted(best, key=lambda r: r.objectives[names[0]], reverse=directions[0] == "maximize")


def summary_text(sweep: Path, records: Sequence[JobRecord], names: Sequence[str], directions: Sequence[str]) -> str:
    """The table of a sweep: what varies, the objectives, how it went, where; the front; what failed and why."""
    keys = varying([record.settings for record in records])
    best = pareto(records, names, directions)
    rows = [
        [f"{record.job}{'*' if record in best else ''}", *(record.settings.get(key) for key in keys),
         *(record.objectives.get(name) for name in names), record.state, _where(sweep, record)]
        for record in records
    ]  # fmt: skip
    counts = [(state, sum(record.state == state for record in records)) for state in STATES]
    title = f"Sweep of {len(records)} jobs: " + ", ".join(f"{n} {state}" for state, n in counts if n)
    text = [table(rows, ["job", *keys, *names, "state", "run"], title)]
    if best:
        aims = ", ".join(f"{name} {direction}" for name, direction in zip(names, directions, strict=True))
        told = [
            f"  job {record.job}: {', '.join(f'{name} {record.objectives[name]:.4g}' for name in names)}"
            f"  ({record.only(keys)})"
            for record in best
        ]
        text.append("\n".join([f"* {'best' if len(names) == 1 else 'Pareto front'} ({aims}):", *told]))
    lines = [f"note: job {record.job} {record.note}" for record in records if record.note]
    found = [record.objectives for record in records if record.state == "done"]
    if found and (missing := [name for name in names if not any(name in values for values in found)]):
        lines.append(f"note: sweep.objectives: no job found {' or '.join(missing)}; sweep.csv has what they found")
    failed = [record for record in records if record.state == "failed"]
    lines += [f"failed: job {r.job} ({r.only(keys)}): {r.error}" for r in failed]
    return "\n\n".join([*text, *(["\n".join(lines)] if lines else [])])


def _where(sweep: Path, record: JobRecord) -> str | None:
    if record.run is None:
        return None
    path = (sweep / record.run).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
