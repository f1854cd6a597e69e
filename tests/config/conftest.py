"""A quick way to many variants of one experiment."""

import functools

import pytest
from omegaconf import OmegaConf

from mmprune_train.config.compose import compose_config, config_from
from mmprune_train.config.schema import Config
from mmprune_train.usage import GROUPS


@functools.cache
def _smoke_tree():
    return OmegaConf.structured(compose_config(["+experiment=smoke"]))


@pytest.fixture
def smoke():
    """`smoke("key=value", ...)`: the smoke experiment with overrides; composed anew only where a group is chosen."""

    def build(*overrides: str) -> Config:
        if any(override.split("=")[0] in GROUPS for override in overrides):
            return compose_config(["+experiment=smoke", *overrides])
        return config_from(OmegaConf.merge(_smoke_tree(), OmegaConf.from_dotlist(list(overrides))))

    return build
