"""One job of a sweep: announced, run, recorded. What fails is recorded, too, and leaves the other jobs alone."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig

from mmprune_train.config.command import Command
from mmprune_train.config.compose import config_from
from mmprune_train.config.explain import user_mistake
from mmprune_train.config.identity import home_dir, run_dir
from mmprune_train.config.schema import Config
from mmprune_train.errors import NotFinite
from mmprune_train.reporting.results import numbers, pick, picked
from mmprune_train.reporting.sweeps import JobRecord, read_records, read_settings, relative
from mmprune_train.storage.locks import alone_in
from mmprune_train.storage.secrets import masked
from mmprune_train.training.cluster import rank_here


def run_job(cfg: DictConfig, hydra: HydraConf, command: Command, execute: Callable[[Config], Any]) -> Any:
    """What a sweeper gets from a job.

    Args:
        cfg: the job's config as composed.
        hydra: Hydra's own settings of the job.
        command: the job's overrides.
        execute: runs the task of a config.
    Returns:
        To Hydra's basic sweeper the task's result; to one that optimises, the objective or a list of them. None where
        the job failed: no exception, which would have to survive being pickled, and would end the sweep.
    """
    if rank_here(cfg.trainer.devices):
        return execute(config_from(cfg))  # the first process speaks for the job
    sweep = Path(hydra.sweep.dir)
    number = read_settings(sweep).get("first_job", 0) + hydra.job.num
    record = JobRecord(number, list(map(masked, command.overrides)), started=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    began = time.perf_counter()
    with ExitStack() as held:
        try:
            config = config_from(cfg)
            run = run_dir(config)
            record.run = relative(home_dir(config), sweep)
            print(f"\n== job {record.job}: {changed(record, sweep)} -> {home_dir(config)}", flush=True)
            held.enter_context(alone_in(run, wait=True))
            record.note = same_run(record, sweep) if config.task == "train" else None
            record.write(sweep)
            result = execute(config)
            record.numbers = numbers(result if isinstance(result, Mapping) else {config.task: result})
            values = {name: picked(record.numbers, name) for name in config.sweep.objectives}
            record.objectives = {name: value for name, value in values.items() if value is not None}
            if hydra.runtime.choices["hydra/sweeper"] != "basic":
                aims = [pick(record.numbers, name) for name in config.sweep.objectives]
                result = aims if len(aims) > 1 else aims[0]
            record.state = "done"
        except Exception as error:
            told = fail(record, error, command, debug=bool(cfg.get("debug")))
            print(f"error: job {record.job}: {told}", file=sys.stderr, flush=True)
            result = None
        except BaseException:
            record.state = "interrupted"
            raise
        finally:
            record.seconds = round(time.perf_counter() - began, 1)
            record.write(sweep)
    gc.collect()  # what a job that failed held on to is not to be missing in the next one
    return result


def fail(record: JobRecord, error: Exception, command: Command, debug: bool) -> str:
    """Record the error; a traceback is printed for what no line explains, or with `debug`."""
    message = user_mistake(error, command.overrides)
    record.state, record.mistake = "failed", message is not None
    foreseen = isinstance(error, NotFinite)
    if (message is None and not foreseen) or debug:
        traceback.print_exception(error)
    text = message or (str(error) if foreseen else f"{type(error).__name__}: {error}")
    record.error = " ".join(text.split())
    return record.error


def changed(record: JobRecord, sweep: Path) -> str:
    """The overrides that are this job's own, not the command line's for all jobs."""
    given = read_settings(sweep).get("overrides", [])
    common = {override.lower() for override in given}  # a sweeper may write `true` as `True`
    return " ".join(override for override in record.overrides if override.lower() not in common) or "as it is"


def same_run(record: JobRecord, sweep: Path) -> str | None:
    """A note where another job of the sweep has the same run directory."""
    others = [r for r in read_records(sweep) if r.run == record.run and r.overrides != record.overrides]
    if not others:
        return None
    note = (
        f"has the run directory of job {others[0].job} ({changed(others[0], sweep)}): what differs does not change "
        "what is trained, or run_id= is given; a finished run is not trained again"
    )
    print(f"note: job {record.job} {note}", flush=True)
    return note
