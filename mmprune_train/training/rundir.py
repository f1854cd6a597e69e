"""The run directory: what was run (config.yaml), with what (manifest.json), how far it came, and its result.

Only rank 0 writes. A directory belongs to one set of settings: continuing it with others is refused by key.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mmprune_train.config.compose import config_from_file, to_yaml
from mmprune_train.config.identity import differences, run_dir
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.reporting.text import result_text
from mmprune_train.storage.files import write_json, write_yaml
from mmprune_train.storage.locks import refuse_links
from mmprune_train.storage.run_files import read_manifest, read_result

PACKAGES = ("torch", "transformers", "pytorch-lightning", "peft", "deepspeed", "hydra-core", "numpy", "tokenizers")


@dataclass
class RunDirectory:
    """One run's folder."""

    path: Path
    """`open_run` makes it."""
    writable: bool
    """Rank 0 of the run."""

    def stage(self, name: str) -> Path:
        return self.path / name

    def checkpoints(self, stage: str) -> list[Path]:
        """Of a stage, oldest first."""
        from mmprune_train.training.checkpoint_files import all_checkpoints  # torch, which a finished run need not have

        return all_checkpoints(self.path / stage / "checkpoints")

    def model(self, stage: str) -> Path:
        """Hugging Face folder at the end of a stage."""
        return self.path / stage / "model"

    @property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.path) or {}

    def update(self, **entries: Any) -> None:
        """Set top-level entries of manifest.json."""
        if self.writable:
            write_json(self.path / "manifest.json", {**self.manifest, **entries}, checked=True)

    def stage_state(self, stage: str) -> dict[str, Any]:
        return self.manifest.get("stages", {}).get(stage, {})

    def update_stage(self, stage: str, **entries: Any) -> None:
        stages = self.manifest.get("stages", {})
        self.update(stages={**stages, stage: {**stages.get(stage, {}), **entries}})

    def finished(self, stage: str) -> bool:
        return self.stage_state(stage).get("state") == "done"

    @property
    def result(self) -> dict[str, Any] | None:
        return read_result(self.path / "result.json", result_text)

    def write_result(self, result: dict[str, Any]) -> None:
        if self.writable:
            write_json(self.path / "result.json", result, checked=True)


def open_run(config: Config, writable: bool = True) -> RunDirectory:
    """The run directory of a config: made, or found and checked.

    `config.restart` moves an existing one aside, never deletes it. Every process calls this: what is wrong for the one
    that writes must end the others, too.

    Raises:
        UserError: the directory was made with other settings; the message names them.
    """
    path = run_dir(config)
    if config.restart and not writable:
        return RunDirectory(path, False)  # it may be on its way aside
    if config.restart and path.exists():
        aside = free_name(path)
        path.rename(aside)
        print(f"restart: moved {path} to {aside}", flush=True)
    refuse_links(path, (*path.glob("*"), *path.glob("*/*")))
    written = path / "config.yaml"
    if written.is_file():
        begun = config_from_file(written)
        if {config.init_from, *(stage.init_from for stage in config.stage.values())} != {None}:
            from mmprune_train.training.starts import as_begun  # takes seconds

            config = as_begun(config, begun, RunDirectory(path, False))
        if changed := differences(begun, config):
            raise UserError(
                f"{path} was made with other settings: {'; '.join(changed[:5])}; undo them, or give another run_id=, "
                "or restart=true to move the old run aside"
            )
    elif writable:
        write_yaml(written, to_yaml(config))
    run = RunDirectory(path, writable)
    if writable and not run.manifest:
        run.update(
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            run_id=path.name,
            experiment=config.experiment_name,
            seed=config.seed,
            git_commit=git_commit(),
            versions=versions(),
            stages={},
        )
    return run


def discard_unstarted(run: RunDirectory) -> None:
    """Remove a run directory that this process has made, where no step was trained: what it was to be trained with was
    wrong, and it would refuse the corrected command."""
    trained = [file for file in run.path.glob("*/metrics.jsonl") if file.stat().st_size]
    if not trained and not any(run.path.glob("*/checkpoints/*")):
        shutil.rmtree(run.path)


def free_name(path: Path) -> Path:
    """`path` with the first `.oldN` behind it that is not taken."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return candidate


def versions() -> dict[str, str]:
    """Versions of what decides the numbers; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, "mmprune_train"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout that this package lies in, with `-dirty` for uncommitted changes; None outside of git."""
    here = Path(__file__).resolve().parent
    if "site-packages" in here.parts:  # a virtual environment inside somebody's checkout
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
