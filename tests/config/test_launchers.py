"""The launchers' jobs are as large as the training that they run."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mmprune_train.config.compose import register_schema
from mmprune_train.storage.conf import conf_dir

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'mmprune-train[sweep]'")


def launcher(*overrides: str) -> Any:
    register_schema()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return compose("config", ["+experiment=smoke", *overrides], return_hydra_config=True).hydra.launcher


@pytest.mark.parametrize("name", ["submitit_slurm", "submitit_local"])
def test_a_job_follows_the_trainer(name: str) -> None:
    found = launcher(f"hydra/launcher={name}", "trainer.devices=4", "trainer.num_nodes=2", "trainer.num_workers=3")
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node) == (2, 4, 4)
    assert found._target_.startswith("hydra_plugins.hydra_submitit_launcher"), "the plugin's own defaults are there"
    on_cpu = launcher(f"hydra/launcher={name}", "trainer.accelerator=cpu", "hydra.launcher.mem_gb=8")
    assert on_cpu.gpus_per_node is None and on_cpu.mem_gb == 8


def test_a_slurm_job_has_time_to_save_and_comes_back() -> None:
    found = launcher("hydra/launcher=submitit_slurm", "trainer.num_workers=3", "hydra.launcher.partition=gpu")
    assert found.cpus_per_task == 4 and found.partition == "gpu"
    assert found.signal_delay_s >= 120 and found.max_num_timeout > 0
