"""The command that a task is started by: its overrides, and the keys that they ask for by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmprune_train.config.tree import leaves
from mmprune_train.config.typed import group_of, key_of, options_of, readable
from mmprune_train.storage.conf import conf_dir

if TYPE_CHECKING:
    from hydra._internal.config_repository import ConfigRepository

SAME = "the same command"
AGAIN = f"{SAME} (without restart=true)"
"""What continues a run, in words: `restart=true`, given again, would move it aside."""


@dataclass(frozen=True)
class Command:
    """What was asked for by name. All else in a config are defaults, which give way to a checkpoint's own settings.

    From Python a task does the same as from the shell where it is given both:

        overrides = ["task=evaluate", "ckpt=runs/demo/RUN_ID", "pruner=fastv"]
        evaluate.run(compose_config(overrides), Command.of(overrides))
    """

    overrides: tuple[str, ...] = ()
    """As they were typed; of a job of a sweep, its own."""
    keys: frozenset[str] = frozenset()
    """Keys that they give, config groups (for all below them), and what the file of an experiment sets in turn."""
    sweeping: bool = False
    """Whether this is a job of a sweep."""

    @classmethod
    def of(cls, overrides: Sequence[str], sweeping: bool = False, sources: Sequence[str] = ()) -> Command:
        """The command with these overrides.

        Args:
            overrides: such as compose; others have no defined result.
            sweeping: whether this is a job of a sweep.
            sources: where the options of config groups are looked for, as Hydra writes it; by default `conf/`.
        """
        overrides = readable(overrides)
        typed = frozenset(map(key_of, overrides))
        keys, repository = set(typed), _repository(sources or [str(conf_dir())])
        for override in overrides:
            if repository.group_exists(group := key_of(override)):
                for option in options_of(override):
                    keys.update(_set_by(repository, f"{group}/{option}", typed))
        return cls(tuple(overrides), frozenset(keys), sweeping)

    def names(self, *sections: str) -> bool:
        """Whether one of these sections of the config, or a key in it, was asked for."""
        return not {group_of(key) for key in self.keys}.isdisjoint(sections)


def _repository(sources: Sequence[str]) -> ConfigRepository:
    from hydra._internal.config_repository import ConfigRepository
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers how sources are read
    search = ConfigSearchPathImpl()
    for source in sources:
        search.append("mmprune_train", source)
    return ConfigRepository(search)


def _set_by(repository: ConfigRepository, path: str, typed: frozenset[str]) -> Iterator[str]:
    """Keys and groups that the file of an option sets: one for all groups (`# @package _global_`) those of its body and
    of its defaults list, any other its own group.

    Args:
        path: of the option, `experiment/smoke`.
        typed: groups whose option the command line chooses, whatever a defaults list says.
    """
    from hydra.core.default_element import GroupDefault
    from omegaconf import OmegaConf

    found, folder = repository.load_config(path), path.rpartition("/")[0]
    if found is None:
        return
    package = found.header.get("package") or folder.replace("/", ".")
    if package != "_global_":
        yield package.removeprefix("_global_.")
        return
    yield from (key for key, _ in leaves(OmegaConf.to_container(found.config, resolve=False)))
    for default in found.defaults_list or []:
        default.update_parent(folder, "")
        if not isinstance(default, GroupDefault):
            if not default.is_self():
                yield from _set_by(repository, default.get_config_path(), typed)
        elif (group := default.get_group_path()) not in typed:
            yield group.replace("/", ".")
            for option in [default.value] if isinstance(default.value, str) else default.value or []:
                yield from _set_by(repository, f"{group}/{option}", typed)
