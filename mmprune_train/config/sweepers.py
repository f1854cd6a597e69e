"""This project's defaults for the sweeper plugins that are installed."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

TRIALS = 20


def register_sweepers() -> None:
    """Store the defaults over the plugins' own, which a YAML file of the same name may not do.

    The keys and their types stay the plugin's. See docs/sweeps.md.
    """
    Plugins.instance()  # the plugins have stored theirs then
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
