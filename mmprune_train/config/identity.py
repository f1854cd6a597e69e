"""Which settings make a run the run it is, the directory that follows from them, and how two runs differ."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmprune_train.config.in_effect import in_effect
from mmprune_train.config.masking import masked_settings
from mmprune_train.config.renamed import RENAMED, upgraded
from mmprune_train.config.schema import Config
from mmprune_train.config.tree import leaves
from mmprune_train.errors import UserError
from mmprune_train.storage.files import read_yaml
from mmprune_train.storage.secrets import masked, note_arguments

NOT_DECISIVE = frozenset(
    {
        "task", "experiment_name", "run_id", "runs_dir", "stages", "ckpt", "restart", "trust_components", "debug",
        "logger", "evaluate", "generate", "bench", "calibrate", "plan", "sweep", "report",
        # where things lie and how mistakes are explained
        "data.root", "data.how_to_get", "data.outside_images",
        # `knee` only feeds the pruner's own budgets, which count
        "knee",
        # how fast and how safely, not what
        "trainer.num_workers", "trainer.log_every", "trainer.checkpoint_every_steps", "trainer.keep_checkpoints",
        "trainer.save_every_minutes", "trainer.keep_best", "trainer.on_nonfinite", "trainer.max_nonfinite_steps",
        "trainer.vision_chunk", "trainer.feature_cache", "trainer.feature_cache_dir", "trainer.attention",
        "trainer.logits_chunk", "trainer.compile",
        "data.evaluate",
        "data.blind",
    }
)  # fmt: skip
"""Keys (with all below them) that may change between two starts of one run without changing what it trains."""


def decisive(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of every setting that decides what is trained."""
    tree = dataclasses.asdict(config) if isinstance(config, Config) else config
    return {key: value for key, value in leaves(masked_settings(in_effect(tree))) if _decides(key)}


def _decides(key: str) -> bool:
    parts = key.split(".")
    return NOT_DECISIVE.isdisjoint(".".join(parts[:count]) for count in range(1, len(parts) + 1))


def run_id(config: Config) -> str:
    """`config.run_id`, or 8 hex digits of a hash of the decisive settings: the same on every rank, at every start."""
    if config.run_id is not None:
        return config.run_id
    text = json.dumps(decisive(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def sweep_name(experiment: str, choices: Mapping[str, Any], overrides: Sequence[str], params: Any) -> str:
    """Folder of a sweep: what it is a sweep of, and 8 hex digits of a hash of the command; the same at every start.

    Args:
        experiment: `experiment_name`, where no group `sweep` is chosen.
        choices: config group -> chosen option.
        overrides: the command line's, sweeps not yet expanded.
        params: the sweeper's own.
    """
    note_arguments(overrides)
    command = sorted(masked(override) for override in overrides if override.lstrip("+").lower() not in STARTED_OVER)
    asked = json.dumps([command, choices["hydra/sweeper"], str(params)])
    return f"{choices.get('sweep') or experiment}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


STARTED_OVER = ("restart=true", "debug=true")
"""Overrides that make neither a sweep nor one of its jobs another one."""


def run_dir(config: Config) -> Path:
    """`runs_dir/experiment_name/run_id`; not created here. A run of these settings that was begun when their keys had
    other names, and its hash was another, is gone on with."""
    path = Path(config.runs_dir) / config.experiment_name / run_id(config)
    if config.run_id is None and not config.restart and not path.exists():
        return next((run for run in path.parent.glob("[0-9a-f]" * 8) if _begun_as(run, config)), path)
    return path


def _begun_as(run: Path, config: Config) -> bool:
    """Whether a run was begun with these settings under former keys. One whose settings are damaged was not."""
    from mmprune_train.config.compose import config_from_file

    before = _former_decisive(run / "config.yaml")
    asked = decisive(config)
    if not before or any(asked.get(key, value) != value for key, value in before.items()):
        return False
    try:
        return not differences(config_from_file(run / "config.yaml"), config)
    except UserError:
        return False


@functools.cache
def _former_decisive(file: Path) -> dict[str, Any]:
    """What decides a run by its config.yaml of former keys; empty where that has none, or cannot be read."""
    import yaml

    try:
        text = read_yaml(file)
        if not re.search(rf"^ +({'|'.join(former.rpartition('.')[2] for former in RENAMED)}):", text, re.MULTILINE):
            return {}
        return decisive(upgraded(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))))
    except (UserError, yaml.YAMLError, RecursionError, AttributeError):
        return {}


def run_of(ckpt: str | None) -> Path | None:
    """The run directory that `ckpt=` names, itself, by a stage's folder in it or by that's `model/`; None: it names no
    run."""
    if not ckpt:
        return None
    folder = Path(ckpt).expanduser()
    here = folder.absolute()  # `model`, given from within the run
    runs = [folder]
    if (here / "metrics.jsonl").is_file() or (here / "model").is_dir():
        runs.append(folder.parent if len(folder.parts) > 1 else here.parent)
    if here.name == "model":
        runs.append(folder.parent.parent if len(folder.parts) > 2 else here.parent.parent)
    return next((run for run in runs if (run / "manifest.json").is_file()), None)


def home_dir(config: Config) -> Path:
    """Where results go: the run directory that `ckpt=` names, else the config's own."""
    return run_of(config.ckpt) or run_dir(config)


def differences(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[str]:
    """Decisive settings in which two configs differ, as `key: old -> new` lines; either may be a plain mapping."""
    before, after = decisive(old), decisive(new)
    keys = [key for key in {**before, **after} if before.get(key, _UNSET) != after.get(key, _UNSET)]
    return [f"{key}: {before.get(key, '(not set)')} -> {after.get(key, '(not set)')}" for key in keys]


_UNSET = object()


def without_effect(finished: Config, asked: Config) -> list[str]:
    """Settings of how to train, as `key=value`, that were others when a run was trained: now nothing is."""
    before, now = (masked_settings(dataclasses.asdict(config)) for config in (finished, asked))
    changed = [f"trainer.{key}={value}" for key, value in now["trainer"].items() if before["trainer"][key] != value]
    if before["logger"] != now["logger"]:
        changed.append(f"logger={now['logger']}")
    return changed
