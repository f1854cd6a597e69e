"""This project's defaults for submitit's launchers, where that plugin is installed."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

DAY = 24 * 60
YEAR = 365 * DAY


def register_launchers() -> None:
    """Store the defaults over the plugin's own, which a YAML file of the same name may not do.

    The keys and their types stay the plugin's. See docs/launching.md.
    """
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
