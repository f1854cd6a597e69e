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
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException

from mmprune_train.components.registry import default_of
from mmprune_train.config import checks
from mmprune_train.config.docs import all_keys
from mmprune_train.config.explain import explain, unknown_key, user_mistake
from mmprune_train.config.identity import sweep_name
from mmprune_train.config.in_effect import as_now
from mmprune_train.config.knee import follow_group
from mmprune_train.config.masking import masked_settings, note_given, note_settings
from mmprune_train.config.plugins import register_launchers, register_sweepers
from mmprune_train.config.pruner import check_own_components, check_pruner
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.config.renamed import former_settings, refuse_former
from mmprune_train.config.schema import Config, DataConfig, data_config
from mmprune_train.config.typed import literal, readable
from mmprune_train.errors import UserError, unknown_name
from mmprune_train.storage.conf import conf_dir, options
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
    """The typed tree. Parameters of components and what is said of single benchmarks may have any name, and so may
    parts of `data`, of which `_typed` lets those of the training stages stay."""
    tree = OmegaConf.structured(Config)
    for named in (tree.evaluate.splits, tree.evaluate.prompts):
        named._set_flag("struct", False)
    OmegaConf.set_struct(tree.data, False)
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
    keys = note_settings(cast("dict[str, Any]", written))
    config = _typed(cfg)
    note_given(keys, dataclasses.asdict(config))
    check_own_components(config.pruner)
    return config


def _typed(cfg: DictConfig) -> Config:
    try:
        stages = tuple(map(str, cfg.stage))
        _refuse_extra_keys(cfg, stages)
        if (data := data_config(stages)) is not DataConfig:
            parts = {"data": OmegaConf.to_container(cfg.data)}
            cfg.data = OmegaConf.merge({"data": OmegaConf.structured(data)}, parts).data
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(config, Config)
    follow_group(config.pruner, config.knee)
    checks.check(config)
    return config


def _refuse_extra_keys(cfg: DictConfig, stages: tuple[str, ...], prefix: str = "") -> None:
    # Hydra's `+key=value` adds keys even to a typed tree, so a typo behind a plus would go unnoticed.
    known = set(all_keys(stages))
    for key in map(str, cfg):
        name = prefix + key
        if name not in known:
            raise UserError(unknown_key(name, stages))
        named = name.endswith((".arch", "args", ".splits", ".prompts"))
        if not named and not OmegaConf.is_missing(cfg, key) and OmegaConf.is_dict(cfg[key]):
            _refuse_extra_keys(cfg[key], stages, f"{name}.")


def compose_config(overrides: list[str]) -> Config:
    """Compose as the command line does, e.g. `compose_config(["+experiment=smoke", "knee=max_chord"])`.

    Raises UserError for an unknown key, group, option or a value that does not fit.
    """
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    refuse_former(overrides)
    register_schema()
    version.setbase("1.3")
    overrides = readable(overrides)
    try:
        loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
        cfg = loader.load_configuration("config", overrides, RunMode.RUN, from_shell=False)
    except Exception as error:
        if (message := user_mistake(error, overrides)) is None:
            raise
        raise UserError(message) from error
    with open_dict(cfg):
        del cfg["hydra"]
    return config_from(cfg)


def config_from_file(path: Path) -> Config:
    """The config that a run wrote to its `config.yaml`. Raises UserError where the file is missing or does not fit."""
    if not path.is_file():
        raise UserError(f"{path} is missing: is {path.parent} a run directory of mmprune_train?")
    try:
        written: Any = OmegaConf.to_container(OmegaConf.create(read_yaml(path)))
        now = as_now(written) if isinstance(written, Mapping) else written
        merged = OmegaConf.merge(schema(), OmegaConf.create(literal(now)))
    except UserError:
        raise
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(f"{path}: {explain(error)}") from error
    except (yaml.YAMLError, AssertionError, ValueError, RecursionError) as error:  # the last two: without end
        told = " ".join(str(error).partition("; use sys.")[0].split())[:160]
        raise damaged(path, f"it is damaged, not YAML of settings ({told})", PUT_BACK) from None
    assert isinstance(merged, DictConfig)
    return _typed(merged)


def to_yaml(config: Config | PrunerConfig) -> str:
    """The config as YAML, without secrets; `config_from_file` reads a whole Config back, `load_pruner` the mapping of a
    pruner."""
    tree = masked_settings(dataclasses.asdict(config))
    return yaml.dump(tree, Dumper=get_omega_conf_dumper(), allow_unicode=True, sort_keys=False)  # `${` is no mistake


def saved_pruner(saved: Mapping[str, Any]) -> PrunerConfig:
    """The settings of the pruner that a model was saved with. Raises as `load_pruner`.

    They were saved whole: a key that came later takes the schema's default, whatever the preset of that name says now.
    """
    now = as_now({"pruner": saved})["pruner"]
    return load_pruner(now, from_preset=not {"vision", "language"} <= now.keys())


def load_pruner(spec: str | Mapping[str, Any] | None, from_preset: bool = True) -> PrunerConfig:
    """A pruner's settings without a whole run's config.

    spec: a name from `conf/pruner`; a mapping shaped like PrunerConfig, whose unset keys come from the preset of its
    `name` (or from the schema's defaults); or None for the dense model. Budgets that follow the `knee` group get
    the default budget. `from_preset=False`: a mapping's unset keys are the schema's defaults. Raises UserError for an
    unknown name, key or value.
    """
    given: dict[str, Any] = {"name": "none" if spec is None else spec} if not isinstance(spec, Mapping) else dict(spec)
    name = given.get("name", PrunerConfig.name)
    refuse_former(former_settings({"pruner": given}))
    known = options("pruner")
    if name not in known and not isinstance(spec, Mapping):
        raise UserError(unknown_name("pruner", name, known))
    try:
        tree = OmegaConf.create(
            {"knee": OmegaConf.structured(KneeConfig), "pruner": OmegaConf.structured(PrunerConfig)}
        )
        tree.knee = OmegaConf.merge(tree.knee, OmegaConf.load(conf_dir() / f"knee/{default_of('knee.method')}.yaml"))
        preset: Any = OmegaConf.create()
        if from_preset and name in known:
            preset = OmegaConf.load(conf_dir() / f"pruner/{name}.yaml")
        tree.pruner = OmegaConf.merge(tree.pruner, _without_replaced(preset, given), literal(given))
        pruner = OmegaConf.to_object(tree.pruner)
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(f"pruner: {explain(error)}") from error
    assert isinstance(pruner, PrunerConfig)
    check_pruner(pruner)
    check_own_components(pruner)
    return pruner


def _without_replaced(preset: Mapping[Any, Any], given: Any) -> dict[Any, Any]:
    """A preset without the arguments of the components that are given in place of its own."""
    named = given if isinstance(given, Mapping) else {}
    return {
        key: _without_replaced(value, named.get(key)) if isinstance(value, Mapping) else value
        for key, value in preset.items()
        if not (key.endswith("args") and (key.removesuffix("_args") if key != "args" else "method") in named)
    }
