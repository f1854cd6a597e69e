"""The model that a task asks: which folder `ckpt=` means, the settings that go with it, and where results go."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mmprune_train.config.checks import check_stage_names
from mmprune_train.config.command import Command
from mmprune_train.config.compose import config_from_file, saved_pruner
from mmprune_train.config.identity import home_dir, run_dir, run_of
from mmprune_train.config.in_effect import same_pruner
from mmprune_train.config.pruner import check_pruner, components, refuse_foreign
from mmprune_train.config.pruner_fits import check_pruner_fits
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.schema import Config
from mmprune_train.config.typed import group_of
from mmprune_train.data.templates import Template, get_template, template_name
from mmprune_train.errors import UserError
from mmprune_train.model.build import load_model, saved_settings
from mmprune_train.model.execution import Execution
from mmprune_train.model.imported import Beside, original_in
from mmprune_train.model.weights.folders import model_folder
from mmprune_train.model.weights.places import base_folder
from mmprune_train.quiet import quiet
from mmprune_train.storage.locks import publishing
from mmprune_train.training.precision import Precision, choose_accelerator, choose_precision
from mmprune_train.training.rundir import RunDirectory, free_name
from mmprune_train.training.sources import changed_components

KEPT = ("data", "encoder", "llm", "stage", "stages", "peft", "evaluate")
"""Sections of a run's own config, of which the command's config has only the keys that are asked for by name."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder and what belongs to it."""

    model: Path | str
    """What `load_model` takes: a folder, or a hub id."""
    home: Path
    """Where a task's folder goes: the run directory that the model belongs to, else this config's."""
    config: Config
    """The command's; of a run, its own settings in `KEPT`, except for what the command asks for."""
    pruner: PrunerConfig | None
    """Instead of the model's own, where the command asks for one."""
    trained: Config | None = None
    """The config of the run; None: this is no run directory."""
    stage: str | None = None
    """Training stage of the run, where another than the last finished one is named."""
    command: Command = Command()
    """What was asked for by name."""


def find_checkpoint(config: Config, command: Command = Command()) -> Checkpoint:
    """What `ckpt=` means, by default this config's own run. Nothing is loaded.

    Raises UserError where there is no such folder, or no model in it, or where the pruner does not fit it.
    """
    run = run_of(config.ckpt or str(run_dir(config)))
    if run is None and not config.ckpt:
        raise UserError(f"ckpt= is not given and {run_dir(config)} has no run; give ckpt=FOLDER or train first")
    model = model_folder(config.ckpt or str(run), "ckpt")
    check_writable(run or home_dir(config))
    if run is None or not (run / "config.yaml").is_file():
        check_stage_names(config)
        settings = Path(model) / "config.json"
        asked = command.names("pruner", "knee") and settings.is_file()
        saved = saved_settings("ckpt", Path(model)).get("pruner") if asked else None
        pruner = asked_pruner(None if saved is None else saved_pruner(saved), settings, config, command)
        return Checkpoint(model, home_dir(config), config, pruner, command=command)
    trained = config_from_file(run / "config.yaml")
    if "stages" in command.keys:
        model = run / config.stages[-1] / "model"
        if not (model / "config.json").is_file():
            raise UserError(f"stages={config.stages}: {run} has no finished stage {config.stages[-1]}; leave it out")
    stage = None if Path(model).resolve() == Path(model_folder(run)).resolve() else Path(model).parent.name
    settled = settled_config(trained, config, command)
    check_stage_names(settled)
    pruner = asked_pruner(trained.pruner, run / "config.yaml", config, command)
    if pruner is not None and same_pruner(pruner, trained.pruner):
        pruner = None
    if pruner is not None:
        settled = replace(settled, pruner=pruner)
        check_pruner_fits(settled)
        if {"pruner", "knee"}.isdisjoint(map(group_of, command.overrides)):
            told = f"the pruner is the experiment's, {pruner.name}, and not {trained.pruner.name} as {run} was trained"
            print(f"note: {told}; +experiment= left out, it is the run's own", file=sys.stderr, flush=True)
    return Checkpoint(model, run, settled, pruner, trained, stage, command)


def check_writable(home: Path) -> None:
    """Raise UserError, before anything is computed, where results could not be kept."""
    nearest = next(path for path in (home.absolute(), *home.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(
            f"{home}: the results would go there, and {nearest} cannot be written to; copy the model/ of the run "
            "elsewhere and give ckpt=COPY"
        )


def settled_config(trained: Config, config: Config, command: Command) -> Config:
    """The command's config with the run's own `KEPT`, in which keys that are asked for have the command's values."""
    settled = OmegaConf.to_object(_with_keys(trained, config, command, KEPT))
    return replace(config, **{name: getattr(settled, name) for name in KEPT})


def asked_pruner(own: PrunerConfig | None, where: Path, config: Config, command: Command) -> PrunerConfig | None:
    """The pruner that the command asks for: by single keys the model's own with these, else the command's; None: it
    asks for none.

    Args:
        own: that the model was trained with; None: not known.
        where: the file that says so, for the message about components in it that nobody trusts.
    """
    if not command.names("pruner", "knee"):
        return None
    if own is None or command.names("knee") or "pruner" in command.keys:
        return config.pruner
    if not config.trust_components:
        refuse_foreign(where, components(own), components(config.pruner))
    pruner = OmegaConf.to_object(_with_keys(replace(config, pruner=own), config, command, ("pruner",)).pruner)
    assert isinstance(pruner, PrunerConfig)
    check_pruner(pruner)
    return pruner


def _with_keys(own: Config, asked: Config, command: Command, sections: tuple[str, ...]) -> Any:
    """A config with those keys of some sections that are asked for by name from another."""
    tree, given = OmegaConf.structured(own), OmegaConf.structured(asked)
    for key in sorted(key for key in command.keys if group_of(key) in sections):  # a group's choice before keys in it
        OmegaConf.update(tree, key, OmegaConf.select(given, key), merge=False, force_add=True)
    return tree


def load(found: Checkpoint) -> tuple[Any, Any, Precision]:
    """The model, its processor, and the precision to compute in."""
    trainer = found.config.trainer
    accelerator = choose_accelerator(trainer.accelerator)
    precision = choose_precision(trainer.precision, accelerator)
    parts = beside(found)
    with quiet():
        model, processor = load_model(
            found.model,
            pruner=found.pruner,
            device=accelerator,
            text=found.config.encoder.text,
            key="ckpt",
            trust_components=found.config.trust_components,
            named=components(found.config.pruner),
            execution=Execution.of(trainer),
            encoder=parts.encoder,
            llm=parts.llm,
        )
    if found.trained is not None:
        stage = Path(found.model).parent.name
        state = RunDirectory(found.home, writable=False).stage_state(stage)
        for component, file in changed_components(model.pruner.settings, state):
            print(f"note: {component}: {file} has changed since stage {stage} was trained with it", file=sys.stderr)
    named = "data.exif_orientation" in found.command.keys
    choose_orientation(processor.image_processor, found.config.data.exif_orientation, named)
    return model, processor, precision


def beside(found: Checkpoint) -> Beside:
    """The encoder and the LLM that the command names, where the checkpoint is one that may be without them."""
    place, config = Path(found.model), found.config
    if found.trained is not None or not place.exists() or original_in("ckpt", place) is None:
        return Beside()
    encoder = base_folder(config.encoder) if found.command.names("encoder") else None
    return Beside(encoder, base_folder(config.llm) if found.command.names("llm") else None)


def prompt_template(processor: Any) -> Template:
    """The template that a loaded model converses in; `plain` asks nothing, so after it that is its LLM's own."""
    return get_template(template_name(processor.chat_template), processor.tokenizer)


def choose_orientation(image_processor: Any, configured: bool, named: bool) -> None:
    """Let images be read as configured where that is `named`, else as the model was trained; as configured, too, where
    its folder does not say."""
    if named or not hasattr(image_processor, "exif_orientation"):
        image_processor.exif_orientation = configured


class Results:
    """Where a task puts what it has found: a folder of its own, also where another process asks the same meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Its name; what an earlier task has left there is moved aside, not lost."""
        self.place = folder
        """Where it was at the last look: one that ended later may have moved it aside in its turn."""
        self._inode: int | None = None

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """The folder, while no other process moves it. The first time something must be written into it."""
        with publishing(self.folder):
            if self._inode is None:
                self._keep_earlier()
                self.folder.mkdir(parents=True, exist_ok=True)
                self._inode = self.folder.stat().st_ino
            self.place = next((place for place in self._places() if place.stat().st_ino == self._inode), self.folder)
            yield self.place

    def _places(self) -> list[Path]:
        asides = self.folder.parent.glob(f"{self.folder.name}.old*")
        return [place for place in (self.folder, *asides) if place.exists()]

    def _keep_earlier(self) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            aside = free_name(self.folder)
            self.folder.rename(aside)
            print(f"moved the earlier {self.folder.name} to {aside}", flush=True)
