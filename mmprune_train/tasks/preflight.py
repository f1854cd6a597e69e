"""What can be known of a training run before it starts: looked at before its directory is made, so that a mistake in a
later stage, or in the evaluation, is not found after hours of training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmprune_train.config.command import Command
from mmprune_train.config.identity import run_dir
from mmprune_train.config.schema import Config
from mmprune_train.devices import CPU, GIB, device_peak
from mmprune_train.errors import UserError
from mmprune_train.tasks.inputs import Found, find_inputs
from mmprune_train.training.rundir import RunDirectory

if TYPE_CHECKING:
    from mmprune_train.model.llava import PackedLlava


def check_inputs(config: Config, todo: Sequence[str], evaluates: bool, command: Command = Command()) -> None:
    """Raise UserError for what would end the run later.

    Args:
        todo: stages that are to be trained.
        evaluates: the model is evaluated after them.
        command: what the config was composed from.
    """
    found = find_inputs(config, todo, [*todo, *(["evaluate"] if evaluates else [])])
    if evaluates:
        from mmprune_train.tasks.evaluate import question_set, training_answers

        question_set(config)
        if config.data.blind:
            training_answers(config, command)
    if todo:
        _check_stages(config, todo, found)


def _check_stages(config: Config, todo: Sequence[str], found: Found) -> None:
    """The network of each stage on the meta device, its adapters' targets, the amount of its data. What the first stage
    checks of its samples' lengths before it trains is checked here of those that come later: samples are tokenised
    where their bytes do not show that they are short enough."""
    from mmprune_train.model.begin import begin
    from mmprune_train.model.peft import adapter_targets
    from mmprune_train.quiet import quiet
    from mmprune_train.training.inputs import stage_annotations, stage_extent, stage_loader
    from mmprune_train.training.network import uses_adapters
    from mmprune_train.training.starts import begins_anew, check_scorer, start_of

    directory = None if config.restart else RunDirectory(run_dir(config), writable=False)
    processor: Any = None
    for name in todo:
        if begins_anew(config, todo, name):
            start = start_of(config, directory, name, download=False)
            check_scorer(config, name, start)
            with quiet():
                model, processor = begin(config, start, empty=True)
            _check_room(config, todo, model, found)
        if uses_adapters(config, name):
            adapter_targets(model.hf, config.peft)
        data = stage_annotations(config, name)
        stage_extent(config, name, data)
        if name != todo[0]:
            loader = stage_loader(config, name, processor.tokenizer, config.encoder.patches, 0, 1, data.records)
            loader.dataset.check_cuts()


def _check_room(config: Config, todo: Sequence[str], model: PackedLlava, found: Found) -> None:
    """Raise UserError where a random network does not fit in this machine's memory, or the models not on the disk."""
    there, parameters = device_peak(CPU).memory_bytes, sum(p.numel() for p in model.hf.parameters())
    tower = sum(p.numel() for p in model.hf.model.vision_tower.parameters())
    for part, needs in (("encoder", 4 * tower), ("llm", 4 * (parameters - tower))):
        if found.get(part, part) is None and needs > there:
            raise UserError(
                f"{part}.arch describes a network for which this machine has no memory ({needs / GIB:,.0f} GiB of "
                f"{there / GIB:,.0f}, in fp32); choose a smaller one"
            )
    place = Path(config.runs_dir).absolute()
    place = next(folder for folder in (place, *place.parents) if folder.exists())
    needs, there = 2 * parameters * len(todo), shutil.disk_usage(place).free
    if needs > there:
        raise UserError(
            f"runs_dir: {place} has {there / GIB:,.1f} GiB left, and the models alone take {needs / GIB:,.1f}; make "
            "room, or set runs_dir="
        )
