"""What `task=export` writes: a model as it was saved, or adapters folded into the model that they belong to."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmprune_train.config.command import Command
from mmprune_train.config.compose import config_from_file, load_pruner, saved_pruner
from mmprune_train.config.identity import home_dir
from mmprune_train.config.pruner import components, refuse_foreign
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin
from mmprune_train.model.build import load_model, saved_settings
from mmprune_train.model.conversation import converse
from mmprune_train.model.export.adapters import check_parity, probe
from mmprune_train.model.imported import original_in
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import merge_adapters
from mmprune_train.model.processor import load_processor
from mmprune_train.model.weights.adapters import check_adapters, put_on
from mmprune_train.model.weights.base import RECORD, base_of, check_base, record_of
from mmprune_train.model.weights.files import weights_of
from mmprune_train.model.weights.folders import ADAPTER_CONFIG, LLAVA
from mmprune_train.model.weights.original import tower_tensors
from mmprune_train.model.weights.places import local_or_hub
from mmprune_train.model.weights.start import Start, base_parts, locate
from mmprune_train.quiet import quiet
from mmprune_train.tasks.checkpoint import (
    KEPT,
    Checkpoint,
    asked_pruner,
    beside,
    check_writable,
    choose_orientation,
    find_checkpoint,
    settled_config,
)

HALF = {"F16": torch.float16, "BF16": torch.bfloat16, **{str(kind): kind for kind in (torch.float16, torch.bfloat16)}}
"""Dtypes as files name them; what is stored in others, or in several, is exported in fp32."""


@dataclass(frozen=True)
class Source:
    """Where the exported model comes from."""

    path: Path
    """Its folder, or a projector's file."""
    home: Path
    """Where the task's result goes."""
    config: Config
    """The command's; of adapters in a run, the run's with what the command asks for."""
    run: Path | None = None
    found: Checkpoint | None = None
    """None: adapters are given."""
    adapters: Path | None = None
    """The adapters that are given, or that were merged into the model of the run."""


@dataclass(frozen=True)
class Loaded:
    """The model that is to be written."""

    model: PackedLlava
    processor: Any
    stored: torch.dtype
    """What the weights in its folder were saved in; fp32 where they differ."""
    tower_beside: bool
    """Its vision tower lies elsewhere, perhaps in another dtype: the model is in fp32, which holds both."""
    parity: dict[str, float] | None
    """How far its logits are from those of its adapters beside their base; None: it has none, or they are not here."""


def find_source(config: Config, command: Command) -> Source:
    """What `ckpt=` means to an export. Raises as `find_checkpoint`."""
    place = Path(config.ckpt or "").expanduser()
    if config.ckpt and (place / ADAPTER_CONFIG).is_file():
        run = place.resolve().parent.parent
        inside = (run / "config.yaml").is_file()
        home = run if inside else home_dir(config)
        check_writable(home)
        if inside:
            config = _in_run(config_from_file(run / "config.yaml"), config, command)
        return Source(place, home, config, run if inside else None, adapters=place)
    found = find_checkpoint(config, command)
    path = found.model if isinstance(found.model, Path) else local_or_hub("ckpt", found.model)
    if found.trained is None:
        return Source(path, found.home, found.config, found=found)
    adapters = path.parent / "adapters"
    return Source(path, found.home, found.config, found.home, found, adapters if adapters.is_dir() else None)


def _in_run(trained: Config, config: Config, command: Command) -> Config:
    """The run's config with what the command asks for; whom to trust, and the pruner, the command alone says."""
    settled = settled_config(trained, config, command)
    taken: dict[str, Any] = {name: getattr(settled, name) for name in KEPT}
    taken |= {name: getattr(config, name) for name in ("export", "trainer", "pruner", "trust_components")}
    return replace(trained, **taken)


def load_source(source: Source, command: Command) -> Loaded:
    """The model that `find_source` found, on the host. Raises as `load_model`, and where merged adapters answer
    otherwise than beside their base."""
    if source.found is None:
        return _merged(source, command)
    found, unmerged = source.found, _unmerged(source)
    stored, parts, tower_beside = _stored(source.path), beside(found), _tower_beside(source.path)
    with quiet():
        model, processor = load_model(
            source.path,
            pruner=found.pruner,
            dtype=torch.float32 if tower_beside or unmerged is not None else stored,
            text=found.config.encoder.text,
            key="ckpt",
            trust_components=found.config.trust_components,
            named=components(found.config.pruner),
            encoder=parts.encoder,
            llm=parts.llm,
        )
    named = "data.exif_orientation" in command.keys
    choose_orientation(processor.image_processor, found.config.data.exif_orientation, named)
    parity = None if unmerged is None else check_parity(unmerged, probe(model), stored)
    return Loaded(model, processor, stored, tower_beside, parity)


def _stored(path: Path) -> torch.dtype:
    """What the weights are saved in; of a projector whose LLM lies elsewhere, fp32."""
    if original := original_in("ckpt", path):
        path = original.path
    if path.is_file():
        return torch.float32
    kinds = {entry.dtype for entry in weights_of("ckpt", path).values()}
    return HALF.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _tower_beside(path: Path) -> bool:
    original = original_in("ckpt", path)
    return original is not None and not (original.path.is_dir() and tower_tensors(weights_of("ckpt", original.path)))


def _unmerged(source: Source) -> Tensor | None:
    """The probe of a run's base with its adapters beside it; None where that cannot be had, with a note why."""
    if source.adapters is None or source.found is None or source.found.trained is None:
        return None
    config = replace(source.found.trained, trainer=source.config.trainer, pruner=load_pruner("none"))
    try:
        if config.peft.name == "qlora":
            raise UserError("their base was in 4 bits, which the merged weights are not")
        with quiet():
            model = _beside_base(config, _start(config, source.adapters))[0]
        return probe(model)
    except UserError as error:
        print(f"note: the merged weights are not compared with their adapters: {error}", file=sys.stderr, flush=True)
        return None
    finally:
        gc.collect()


def _start(config: Config, adapters: Path) -> Start:
    """Adapters and what they belong to. Raises UserError where that is not here, or has other content."""
    check_adapters("ckpt", adapters)
    start = replace(locate("ckpt", str(adapters)), goes_on=True)
    if recorded := base_of("ckpt", adapters):
        check_base("ckpt", adapters, recorded, base_parts(config, start))
    return start


def _beside_base(config: Config, start: Start, template: str | None = None) -> tuple[PackedLlava, Any]:
    """The base with the adapters on it, not merged, in fp32."""
    model, processor = begin(config, start, torch.float32, template=template)
    put_on(model.hf, start.key, start.path)
    return model.eval(), processor


def _merged(source: Source, command: Command) -> Loaded:
    """Given adapters, folded into the model that they belong to."""
    path, config = source.path, source.config
    start = _start(config, path)
    whole = start.whole.path if start.whole is not None and start.whole.kind == LLAVA else None
    saved = [
        folder for folder in (path.resolve().parent / "model", whole) if folder and (folder / "config.json").is_file()
    ]
    settings = record_of("ckpt", path).get("mmprune") or (saved_settings("ckpt", saved[0]) if saved else {})
    own = None if settings.get("pruner") is None else saved_pruner(settings["pruner"])
    pruner = asked_pruner(own, path / RECORD, config, command)
    if pruner is None and own is not None and not config.trust_components:
        refuse_foreign(path / RECORD, components(own), {})
    config = replace(config, pruner=pruner or own or load_pruner("none"))
    with quiet():
        model, processor = _beside_base(config, start, settings.get("template"))
        unmerged = probe(model)
        merge_adapters(model.hf)
        parity = check_parity(unmerged, probe(model), torch.float32)
        prepared = [folder for folder in (path, *saved) if (folder / "processor_config.json").is_file()]
        if prepared:  # images as in training, which an encoder alone does not say
            processor = load_processor(prepared[0], model.hf)
            converse(model.hf, processor, model.template, config.llm.template)
    choose_orientation(processor.image_processor, config.data.exif_orientation, "data.exif_orientation" in command.keys)
    return Loaded(model, processor, torch.float32, False, parity)
