"""A sweep from outside its jobs: checked before the first, summed up after the last."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mmprune_train.config.checks import check_sweep
from mmprune_train.config.task_schema import SweepConfig
from mmprune_train.errors import UserError
from mmprune_train.reporting.sweeps import SWEEP, JobRecord, read_records, read_settings, summary_text, write_summary
from mmprune_train.storage.checksums import as_checksums, checksum_of, first_fault
from mmprune_train.storage.files import write_json
from mmprune_train.storage.run_files import MISSHAPEN
from mmprune_train.storage.secrets import masked
from mmprune_train.training.cluster import check_sweep_is_alone

STUDY = "optuna.db"
_watch: SweepWatch | None = None
"""The sweep that this process has started."""


class SweepWatch(Callback):
    """Hydra's callback (`hydra.callbacks` in conf/config.yaml)."""

    def __init__(self) -> None:
        self.folder = Path()
        self.settings: dict[str, Any] = {}
        self.before: dict[Path, int] = {}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _watch
        self.folder = Path(config.hydra.sweep.dir)
        try:
            refuse(config)
            check_study(self.folder)
            first = first_job(self.folder, config.hydra.runtime.choices["hydra/sweeper"])
        except UserError as error:  # Hydra turns a callback's exceptions into warnings
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        self.folder.mkdir(parents=True, exist_ok=True)  # before a sweeper opens its storage there
        self.settings = {
            "overrides": list(map(masked, config.hydra.overrides.task)),
            "params": _sweeper(config).get("params"),
            "sweeper": config.hydra.runtime.choices["hydra/sweeper"],
            "launcher": config.hydra.runtime.choices["hydra/launcher"],
            "objectives": list(config.sweep.objectives),
            "directions": list(config.sweep.directions),
            "first_job": first,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        logging.getLogger("hydra_plugins").setLevel(logging.ERROR)  # of failed jobs our own line says more
        self.before = record_times(self.folder)
        write_json(self.folder / SWEEP, self.settings, checked=True)
        earlier = f" ({len(self.before)} jobs are recorded there already)" if self.before else ""
        print(f"sweep: {self.folder}{earlier}", flush=True)
        _watch = self

    def sum_up(self) -> int:
        """Print and write the table; the exit code of the jobs that this process started."""
        fresh = {path for path, when in record_times(self.folder).items() if self.before.get(path) != when}
        if not fresh:
            print(f"error: no job of the sweep has left a record in {self.folder}", file=sys.stderr, flush=True)
            return 1
        records = read_records(self.folder)
        names, directions = self.settings["objectives"], self.settings["directions"]
        study = self.folder / STUDY
        settings = self.settings | ({STUDY: asdict(checksum_of(study))} if study.is_file() else {})
        write_summary(self.folder, settings, records)
        print(f"\n{summary_text(self.folder, records, names, directions)}\n\n{self.folder}", flush=True)
        return exit_code([JobRecord.read(path) for path in fresh])


def check_study(folder: Path) -> None:
    """Raise UserError where Optuna's study is not as the sweep left it: it decides what is tried next."""
    try:
        known = as_checksums({STUDY: read_settings(folder)[STUDY]})
    except MISSHAPEN:  # there is none, or a damaged one: a sweep that starts writes it anew
        return
    if fault := first_fault(folder, known):
        raise UserError(f"{folder}: {fault}; put an earlier copy back, or move the folder aside to search anew")


def first_job(folder: Path, sweeper: str) -> int:
    """What Hydra's numbers are counted from: the basic sweeper starts its jobs again, others go on with new ones."""
    last = max((record.job for record in read_records(folder)), default=-1)
    return 0 if sweeper == "basic" else 1 + last


def record_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.json")}


def finish_sweep() -> int:
    """Sum up the sweep that this process has started, if it has; returns its exit code."""
    global _watch
    watch, _watch = _watch, None
    return 0 if watch is None else watch.sum_up()


def exit_code(records: list[JobRecord]) -> int:
    """0: all jobs are done. 2: none is, and each failed by the user's mistake. 1: anything else."""
    if all(record.state == "done" for record in records):
        return 0
    return 2 if all(record.state == "failed" and record.mistake for record in records) else 1


def _sweeper(config: DictConfig) -> dict[Any, Any]:
    settings = OmegaConf.to_container(config.hydra.sweeper)
    assert isinstance(settings, dict)
    return settings


def refuse(config: DictConfig) -> None:
    """Raise UserError for what would make every job fail, or all of them the same."""
    check_sweep_is_alone()
    sweep = SweepConfig(list(config.sweep.objectives), list(config.sweep.directions))
    check_sweep(sweep)
    if config.hydra.runtime.choices["hydra/sweeper"] == "basic":
        return
    settings = _sweeper(config)
    given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = {override.key_or_group for override in given if override.is_sweep_override()}
    space = [settings.get(key) for key in ("params", "search_space", "custom_search_space")]
    if not any(space) and not swept:
        raise UserError(
            "nothing to search: give keys several values, e.g. 'seed=1,2' or "
            "'pruner.language.layer=range(1,4)', or choose +sweep=layer_x_knee"
        )
    asked = [name for name in sweep.objectives if "accuracy" in name or name.startswith("evaluate.")]
    swept |= set(settings.get("params") or {})
    if asked and config.task == "train" and not config.evaluate.after_train and "evaluate.after_train" not in swept:
        raise UserError(
            f"sweep.objectives={sweep.objectives}: {asked[0]} needs an evaluation; set evaluate.after_train=true, or "
            "other objectives, e.g. sweep.objectives=[instruct.loss,instruct.keep_ratio]"
        )
