"""The loggers of the `logger` group. Each continues where a resumed run continues."""

from __future__ import annotations

import csv
import hashlib
import netrc
import os
import re
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from mmprune_train.config.schema import LoggerConfig, WandbConfig
from mmprune_train.printed import harmless_output
from mmprune_train.storage.run_files import rows_to
from mmprune_train.storage.secrets import masked
from mmprune_train.training.preemption import EXIT_CODE, Preempted, withheld

PATIENCE = 30.0
"""Seconds that a run which is ended early waits for wandb. Our choice."""
HERE = (Path("wandb/settings"), Path(".wandb/settings"))
"""Settings that wandb takes of the current folder, which may be somebody else's."""


class CsvLogger(Logger):
    """metrics.csv with one row a step; that of a resumed run begins with the rows of metrics.jsonl."""

    name, version = "csv", ""  # type: ignore[assignment]

    def __init__(self, path: Path, flush_every: int, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """
        Args:
            earlier: rows of metrics.jsonl up to the step that is continued, with which the file begins.
        """
        super().__init__()
        self.path = path
        self.flush_every = flush_every
        self.rows: list[dict[str, Any]] = list(earlier)
        self.opened = False

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml holds them

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})
        if len(self.rows) >= self.flush_every:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self.rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a" if self.opened else "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in self.rows for key in row)))
            if not self.opened:
                writer.writeheader()
            writer.writerows(self.rows)
        self.rows, self.opened = [], True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class WandbRun(WandbLogger):
    """A wandb run that training outlives: where Slurm sends SIGTERM to all processes of a job, wandb's own ends at once
    and training still has a step to end and a checkpoint to save."""

    def __init__(self, rows: list[dict[str, Any]], **settings: Any) -> None:
        """
        Args:
            rows: of metrics.jsonl, up to the step that is continued; what wandb lacks of them is logged again.
            settings: WandbLogger's.
        """
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)  # Lightning gives it unasked, and wandb warns that it does nothing
        self.rows = rows
        self.gone = False

    def open(self) -> None:
        """Begin the run, or go on with it. Online wandb says where it is; offline each start has an empty folder."""
        given, sys.argv = sys.argv, list(map(masked, sys.argv))  # which wandb keeps
        try:
            first = self.experiment.step
        finally:
            sys.argv = given
        for row in self.rows:
            if row["step"] >= first:
                self.log_metrics({k: v for k, v in row.items() if k != "step"}, row["step"])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """wandb's step is the optimizer's: steps that a resumed run does again count once there."""
        if not self.gone:
            with self._outlived():
                self.experiment.log({**metrics, "trainer/global_step": step}, step=step, commit=True)

    def close(self, code: int = 0) -> None:
        """End the run with the exit code of training; that of a preempted one goes on."""
        if self.gone:
            return
        with self._outlived():
            if code == EXIT_CODE:
                self.experiment.mark_preempting()
            self.experiment.finish(exit_code=code)

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            yield
        except (ConnectionError, HandleAbandonedError, MailboxClosedError) as error:
            self.gone = True
            print(f"wandb's process is gone ({error}): the next start gives it what it misses", flush=True)


def build_loggers(config: LoggerConfig, stage_dir: Path, run_name: str, resumed_step: int) -> list[Logger]:
    """
    Args:
        stage_dir: folder of the stage; every logger writes below it.
        run_name: the run's and the stage's name, stable over restarts.
        resumed_step: optimizer step that the run continues after; 0 for a new one.
    """
    loggers: list[Logger] = []
    earlier = rows_to(stage_dir / "metrics.jsonl", resumed_step)
    if config.csv is not None:
        loggers.append(CsvLogger(stage_dir / "metrics.csv", config.csv.flush_every, earlier))
    if config.tensorboard is not None:
        from pytorch_lightning.loggers import TensorBoardLogger

        purge = resumed_step + 1 if resumed_step else None
        seconds = config.tensorboard.flush_seconds
        loggers += [TensorBoardLogger(stage_dir, name="tensorboard", version="", purge_step=purge, flush_secs=seconds)]
    if config.wandb is not None:
        os.environ.setdefault("WANDB_SILENT", "true")
        offline = wandb_offline(config.wandb)
        stage_dir.mkdir(parents=True, exist_ok=True)
        run = WandbRun(
            earlier,
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=run_name,
            id=_wandb_id(run_name),
            save_dir=stage_dir,
            offline=offline,
            mode="offline" if offline else "online",
            tags=config.wandb.tags,
            **({} if offline else {"resume": "allow"}),  # an offline run cannot ask the server what it has
        )
        loggers.append(run)
    return loggers


@contextmanager
def open_loggers(loggers: list[Logger]) -> Iterator[None]:
    """Context of a stage's training. At its end, however it ends, the wandb run ends, so that the next stage or job of
    this process opens one of its own; wandb is told of a preemption, after which the same run goes on."""
    runs = [each for each in loggers if isinstance(each, WandbRun)] if rank_zero_only.rank == 0 else []
    with withheld():  # wandb's own process must outlive them
        for run in runs:
            run.open()
    try:
        with harmless_output():  # also in the copy that wandb takes of it
            yield
    except BaseException as error:
        code = EXIT_CODE if isinstance(error, Preempted) else 1
        closing = [threading.Thread(target=run.close, args=(code,), daemon=True) for run in runs]
        for each in closing:  # whose server may not answer, while the job waits to be put back in the queue
            each.start()
        for each in closing:
            each.join(PATIENCE)
        raise
    for run in runs:
        run.close()


def wandb_offline(config: WandbConfig) -> bool:
    """`auto`: online where an account is set up, else offline, which needs none.

    Asking wandb itself would fix its mode for the whole process.
    """
    if config.mode != "auto":
        return config.mode == "offline"
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] != "online"
    return not has_wandb_account()


def has_wandb_account() -> bool:
    """Whether there is a key for wandb, in the environment or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        return urlsplit(server).hostname in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def logger_faults(config: LoggerConfig) -> list[str]:
    """What this machine lacks for the chosen loggers, in a line each."""
    faults = []
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) is not None and find_spec(name) is None:
            faults.append(f"logger={name}: {name} is not installed; pip install {name}, or choose logger=csv")
    online = config.wandb is not None and not wandb_offline(config.wandb)
    if config.wandb is not None and online and not has_wandb_account():
        faults.append(
            f"logger.wandb.mode={config.wandb.mode}: no account is set up here; run `wandb login` (or set "
            "WANDB_API_KEY), or set logger.wandb.mode=offline"
        )
    if online and "WANDB_BASE_URL" not in os.environ:
        faults += [
            f"logger=wandb: {file.absolute()} names a server (base_url), which would get your key: remove that "
            "line, or name the server yourself (WANDB_BASE_URL)"
            for file in HERE
            if file.is_file() and b"base_url" in file.read_bytes()
        ]
    return faults


def _wandb_id(run_name: str) -> str:
    """The name without what wandb does not take, and short enough to be part of file names."""
    name = re.sub(r"[:;,#?/'%\\]", "-", run_name)
    return name if len(name) <= 120 else f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
