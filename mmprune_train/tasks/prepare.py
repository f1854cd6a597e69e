"""`task=prepare`: get and convert the data and weights that an experiment needs, or say what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmprune_train.config.command import Command
from mmprune_train.config.identity import run_dir
from mmprune_train.config.pruner_vision import projects
from mmprune_train.config.schema import Config
from mmprune_train.data import sources
from mmprune_train.reporting.tables import table
from mmprune_train.storage.assets import say
from mmprune_train.storage.files import write_json
from mmprune_train.storage.locks import publishing
from mmprune_train.tasks.inputs import find_inputs, machine_faults

if TYPE_CHECKING:
    from mmprune_train.features.fill import Report


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Everything the run needs, with the places where it lies."""
    splits = [*config.stages, *(["evaluate"] if config.data.evaluate.annotations else [])]
    found = find_inputs(config, config.stages, splits, trains=False)
    for fault in machine_faults(config, config.stages):
        say(f"note: training will need more than there is here: {fault}")
    result: dict[str, Any] = {what: str(place) if place else None for what, place in found.items()}
    rows = [[what, place or "random initialisation"] for what, place in result.items()]
    if config.trainer.feature_cache:
        reports = prepare_features(config)
        for name, report in reports.items():
            rows += [[f"features of {name}", report.folder], ["", report.line()]]
        result["features"] = {name: report.numbers() for name, report in reports.items()}
    print(table(rows, ["ready", "where"]))
    folder = run_dir(config) / "prepare"
    with publishing(folder):
        write_json(folder / "result.json", result)
    return result


def prepare_data(config: Config, split: str) -> tuple[Path, sources.ImageFolder]:
    """(annotation file, image folder) of a split, fetched first where a built-in source has them.

    Raises UserError where one is missing: one line that names its key and how to get it.
    """
    sources.prepare_data(config.data)
    return sources.split_files(config.data, split)


def prepare_features(config: Config) -> dict[str, Report]:
    """Fill the feature cache for all stages from the weights they start with; one report for the stages that prepare
    images alike, by their names.

    The LLM is not loaded. Where stage 1 selects by a projector, it stays on the meta device, too, and the cache is left
    to the training run.
    """
    import torch

    from mmprune_train.model.begin import tower_of
    from mmprune_train.model.build import build_on_meta
    from mmprune_train.quiet import quiet
    from mmprune_train.training.features import askers, fill_for
    from mmprune_train.training.freezing import store_frozen
    from mmprune_train.training.inputs import stage_annotations
    from mmprune_train.training.precision import choose_accelerator, choose_precision
    from mmprune_train.training.starts import begins_anew, start_of

    if projects(config.pruner.vision):
        say("features: stage 1 looks at them through the projector; the cache is filled when training starts")
        return {}
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision(config.trainer.precision, accelerator)
    alike: dict[tuple[str, str], list[str]] = {}
    first = config.stages[0]
    for name in config.stages:
        first = name if begins_anew(config, config.stages, name) else first
        alike.setdefault((first, config.stage[name].image_aspect_ratio), []).append(name)
    reports = {}
    for (begun, _), names in alike.items():
        with quiet():
            torch.manual_seed(config.seed)  # random weights are to be those of a run
            tower = tower_of(config, start_of(config, None, begun)).eval().requires_grad_(False)
            store_frozen(tower, precision.dtype)
            model = build_on_meta(config, tower)
        images = askers([record for name in names for record in stage_annotations(config, name).records])
        _, report = fill_for(config, names[0], model, images, precision.dtype, torch.device(accelerator))
        reports[" and ".join(names)] = report
    return reports
