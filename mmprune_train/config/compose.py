"""From YAML files, overrides or mappings to the typed `Config`.

Hydra composes, OmegaConf checks types, `checks` checks the rest; every mistake comes out as a `UserError`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException

from mmprune_train.components.registry import default_of
from mmprune_train.config import checks
from mmprune_train.config.explain import all_keys, explain, unknown_key, user_mistake
from mmprune_train.config.identity import sweep_name
from mmprune_train.config.knee import follow_group
from mmprune_train.config.launchers import register_launchers
from mmprune_train.config.paths import conf_dir, options
from mmprune_train.config.pruner import check_own_components, check_pruner
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.config.schema import Config
from mmprune_train.config.sweepers import register_sweepers
from mmprune_train.config.typed import literal, readable
from mmprune_train.errors import UserError, unknown_name
from mmprune_train.secrets import masked_settings, note_settings
from mmprune_train.storage.files import PUT_BACK, damaged, read_yaml

SCHEMA_NAME = "mmprune_schema"
"""Name of the typed tree in Hydra's ConfigStore; the first entry of `conf/config.yaml`'s defaults list."""


@functools.cache
def register_schema() -> None:
    """Put the typed tree, the name of a sweep and the defaults of launchers and sweepers where Hydra looks for them."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA_NAME, node=schema(), provider="mmprune_train")
    OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)  # cached: a job has its own
    OmegaConf.register_new_resolver("with_data", with_data, replace=True)
    register_launchers()
    register_sweepers()


def schema() -> DictConfig:
    """The typed tree, in which parameters of components may have any name."""
    tree = OmegaConf.structured(Config)
    pruner = tree.pruner
    for stage in (pruner.vision, pruner.vision.recover, pruner.language):
        for key in stage:
            if key.endswith("_args"):
                stage[key]._set_flag("struct", False)
    for knee in (tree.knee, pruner.vision.knee, pruner.vision.recover.knee, pruner.language.knee):
        knee.args._set_flag("struct", False)
    return tree


def with_data(name: str, value: Any, *, _root_: DictConfig) -> Any:
    """`${with_data:easy_vqa,800}`: 800 where `data.name` is easy_vqa, else null. An experiment's limits and step counts
    are made for its own data; other data are used whole."""
    return value if OmegaConf.select(_root_, "data.name") == name else None


def config_from(cfg: DictConfig) -> Config:
    """The typed config of a composed tree, with interpolations resolved and every check passed.

    Raises UserError for a missing or inconsistent value.
    """
    written = OmegaConf.to_container(cfg, resolve=False)
    note_settings(cast("dict[str, Any]", written))
    config = _typed(cfg)
    check_own_components(config.pruner)
    return config


def _typed(cfg: DictConfig) -> Config:
    try:
        _refuse_extra_keys(cfg)
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(config, Config)
    follow_group(config.pruner, config.knee)
    checks.check(config)
    return config


def _refuse_extra_keys(cfg: DictConfig, prefix: str = "") -> None:
    # Hydra's `+key=value` adds keys even to a typed tree, so a typo behind a plus would go unnoticed.
    known = set(all_keys())
    for key in map(str, cfg):
        name = prefix + key
        if name not in known:
            raise UserError(unknown_key(name))
        if not name.endswith((".arch", "args")) and not OmegaConf.is_missing(cfg, key) and OmegaConf.is_dict(cfg[key]):
            _refuse_extra_keys(cfg[key], f"{name}.")


def compose_config(overrides: list[str]) -> Config:
    """Compose as the command line does, e.g. `compose_config(["+experiment=smoke", "knee=max_chord"])`.

    Raises UserError for an unknown key, group, option or a value that does not fit.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schema()
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # of the command line that calls this
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="mmprune"):
            cfg = compose(config_name="config", overrides=readable(overrides))
    except Exception as error:
        if (message := user_mistake(error)) is None:
            raise
        raise UserError(message) from error
    finally:
        GlobalHydra.instance().hydra = running
    return config_from(cfg)


def config_from_file(path: Path) -> Config:
    """The config that a run wrote to its `config.yaml`. Raises UserError where the file is missing or does not fit."""
    if not path.is_file():
        raise UserError(f"{path} is missing: is {path.parent} a run directory of mmprune_train?")
    try:
        written = OmegaConf.to_container(OmegaConf.create(read_yaml(path)))
        if isinstance(written, dict) and isinstance(written.get("pruner"), dict):
            written["pruner"] = as_saved(written["pruner"])
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(literal(written)))
    except UserError:
        raise
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(f"{path}: {explain(error)}") from error
    except (yaml.YAMLError, AssertionError, ValueError, RecursionError) as error:  # the last two: without end
        told = " ".join(str(error).partition("; use sys.")[0].split())[:160]
        raise damaged(path, f"it is damaged, not YAML of settings ({told})", PUT_BACK) from None
    assert isinstance(merged, DictConfig)
    return _typed(merged)


def as_saved(pruner: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings of a pruner, with what was done before a key existed where they lack it."""
    language = pruner.get("language") or {}
    known = {"min_per_image": 0, **language} if isinstance(language, Mapping) else language
    return {**pruner, "language": known}


def to_yaml(config: Config | PrunerConfig) -> str:
    """The config as YAML, without secrets; `config_from_file` reads a whole Config back, `load_pruner` the mapping of a
    pruner."""
    tree = masked_settings(dataclasses.asdict(config))
    return yaml.dump(tree, Dumper=get_omega_conf_dumper(), allow_unicode=True, sort_keys=False)  # `${` is no mistake


def load_pruner(spec: str | Mapping[str, Any] | None) -> PrunerConfig:
    """A pruner's settings without a whole run's config.

    spec: a name from `conf/pruner`; a mapping shaped like PrunerConfig, whose unset keys come from the preset of its
    `name` (or from the schema's defaults); or None for the dense model. Budgets that follow the `knee` group get
    the default budget. Raises UserError for an unknown name, key or value.
    """
    given: dict[str, Any] = {"name": "none" if spec is None else spec} if not isinstance(spec, Mapping) else dict(spec)
    name = given.get("name", PrunerConfig.name)
    known = options("pruner")
    if name not in known and not isinstance(spec, Mapping):
        raise UserError(unknown_name("pruner", name, known))
    try:
        tree = OmegaConf.create(
            {"knee": OmegaConf.structured(KneeConfig), "pruner": OmegaConf.structured(PrunerConfig)}
        )
        tree.knee = OmegaConf.merge(tree.knee, OmegaConf.load(conf_dir() / f"knee/{default_of('knee.method')}.yaml"))
        preset = OmegaConf.load(conf_dir() / f"pruner/{name}.yaml") if name in known else OmegaConf.create()
        tree.pruner = OmegaConf.merge(tree.pruner, preset, literal(given))
        pruner = OmegaConf.to_object(tree.pruner)
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(f"pruner: {explain(error)}") from error
    assert isinstance(pruner, PrunerConfig)
    check_pruner(pruner)
    check_own_components(pruner)
    return pruner
