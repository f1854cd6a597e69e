"""This project's defaults for submitit's launchers and Optuna's sweeper, where those plugins are installed.

They are stored over the plugins' own, which YAML files of the same names may not do; the keys and their types stay the
plugins'. See docs/launching.md and docs/sweeps.md.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

DAY = 24 * 60
YEAR = 365 * DAY
TRIALS = 20


def register_launchers() -> None:
    Plugins.instance()  # the plugin has stored its own then
    try:
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
    except ImportError:
        return
    OmegaConf.register_new_resolver("cpus", lambda workers: workers + 1, replace=True)
    OmegaConf.register_new_resolver("gpus", lambda kind, devices: None if kind == "cpu" else devices, replace=True)
    size: dict[str, Any] = {  # of a job: one task a process
        "nodes": "${trainer.num_nodes}",
        "tasks_per_node": "${trainer.devices}",
        "gpus_per_node": "${gpus:${trainer.accelerator},${trainer.devices}}",
        "stderr_to_stdout": True,
    }
    slurm = SlurmQueueConf(
        **size,
        cpus_per_task="${cpus:${trainer.num_workers}}",
        timeout_min=DAY,
        max_num_timeout=100,  # before the limit a run is saved and goes back in the queue, so many times
        signal_delay_s=300,
    )
    local = LocalQueueConf(**size, timeout_min=YEAR)  # nobody else waits for this machine
    for name, node in (("submitit_slurm", slurm), ("submitit_local", local)):
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="mmprune_train")


def register_sweepers() -> None:
    Plugins.instance()
    try:
        from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf
    except ImportError:
        return
    optuna = OptunaSweeperConf(
        direction="${sweep.directions}",
        study_name="sweep",
        storage={
            "_target_": "optuna.storages.RDBStorage",
            "url": "sqlite:///${hydra.sweep.dir}/optuna.db",
            # optuna 2 leaves commits to SQLAlchemy, which makes none of its own from version 2 on
            "engine_kwargs": {"isolation_level": "AUTOCOMMIT"},
        },
        n_trials=TRIALS,
        n_jobs=1,  # each trial knows all before it; a launcher that runs jobs in parallel wants more
        max_failure_rate=1.0,  # a failed trial is marked so and told at the end; the others go on
    )
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=optuna, provider="mmprune_train")
