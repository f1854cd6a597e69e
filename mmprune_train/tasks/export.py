"""`task=export`: a trained model as others read it, with a card that says what it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mmprune_train.config.command import Command
from mmprune_train.config.schema import Config
from mmprune_train.config.typed import group_of, key_of
from mmprune_train.errors import UserError
from mmprune_train.model.build import saved_settings
from mmprune_train.model.export.adapters import save_adapter
from mmprune_train.model.export.hf import save_hf, settings_of
from mmprune_train.model.export.llava import save_llava
from mmprune_train.model.export.shards import DTYPES
from mmprune_train.model.scorer import has_scorer
from mmprune_train.model.weights.adapters import check_adapters
from mmprune_train.model.weights.auto import processor_of
from mmprune_train.model.weights.base import base_of, hash_of, record_of, weight_files
from mmprune_train.model.weights.files import read_config, weights_of
from mmprune_train.model.weights.original import tower_tensors
from mmprune_train.model.weights.places import public_name
from mmprune_train.model.weights.start import base_parts, locate
from mmprune_train.reporting.model_card import model_card
from mmprune_train.reporting.tables import table
from mmprune_train.storage.atomic import new_folder
from mmprune_train.storage.files import write_json
from mmprune_train.storage.run_files import read_manifest
from mmprune_train.tasks.card_facts import card_facts
from mmprune_train.tasks.checkpoint import Results, beside
from mmprune_train.tasks.export_source import Loaded, Source, find_source, load_source


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Write `export.out`, whole or not at all, and `export/result.json`."""
    if not config.export.out:
        raise UserError("task=export needs export.out=FOLDER, the folder to write")
    out = Path(config.export.out).expanduser()
    with new_folder(out, "export.out") as part:
        source = find_source(config, command)
        if config.export.format == "adapter":
            _refuse_pruner(source, command)
            written, settings, tower = _write_adapters(source, part)
        else:
            written, settings, tower = _write_model(source, load_source(source, command), part)
        card = model_card(card_facts(source, written, settings, tower))
        (part / "README.md").write_text(card, encoding="utf-8")
        written["files"] = sum(1 for path in part.rglob("*") if path.is_file())
    result = {
        "asked": {"ckpt": str(source.path), "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        "out": str(out),
        "format": config.export.format,
        **written,
    }
    results = Results(source.home / "export")
    with results.writing() as folder:
        write_json(folder / "result.json", result, checked=True)
    print(f"\n{_told(result)}\n\n{out}", flush=True)
    return result


Written = tuple[dict[str, Any], dict[str, Any], str]
"""For the result; the pruner's settings; type of the vision tower."""


def _write_model(source: Source, loaded: Loaded, part: Path) -> Written:
    settings = source.config.export
    shard = int(settings.shard_gb * 1e9)
    tower, inside = _tower(source) if settings.format == "llava" else ("", True)
    dtype = DTYPES.get(settings.dtype, torch.float32 if loaded.tower_beside and inside else loaded.stored)
    if settings.format == "llava":
        size = save_llava(loaded.model, loaded.processor, part, dtype, tower, inside, shard)
    else:
        size = save_hf(loaded.model, loaded.processor, part, dtype, shard)
    hf, pruner = loaded.model.hf, settings_of(loaded.model)["pruner"]
    written = {
        "dtype": _name(dtype),
        "weights_gb": size / 1e9,
        "parameters": sum(parameter.numel() for parameter in hf.parameters()),
        "pruner": pruner["name"],
        "parity": loaded.parity,
    }
    return written, pruner, hf.config.vision_config.model_type


def _refuse_pruner(source: Source, command: Command) -> None:
    typed = {group_of(key_of(override)) for override in command.overrides}
    if typed & {"pruner", "knee"} or (source.found is not None and source.found.pruner is not None):
        raise UserError(
            "export.format=adapter: adapters go out with the pruner that they were trained with, and the command asks "
            "for another; leave pruner= and knee= (and +experiment=) out, or take export.format=hf"
        )


def _write_adapters(source: Source, part: Path) -> Written:
    adapters = source.adapters
    if adapters is None:
        raise UserError(
            f"export.format=adapter: {source.path} has no adapters beside it; give a run that trained some (peft=lora, "
            "in a stage with use_peft) or their folder, or take export.format=hf"
        )
    check_adapters("ckpt", adapters)
    base = base_of("ckpt", adapters)
    if not base:
        start = locate("ckpt", str(adapters))
        parts = {name: folder for name, folder in base_parts(source.config, start).items() if folder is not None}
        base = {n: {"sha256": hash_of(weight_files(f)), "source": public_name(str(f))} for n, f in parts.items()}
    model = adapters.resolve().parent / "model"
    settings = record_of("ckpt", adapters).get("mmprune") or saved_settings("ckpt", model)
    if has_scorer(model):
        raise UserError(
            f"export.format=adapter: the pruner of {source.path} scores by trained weights, and adapters have "
            "no place for them; take export.format=hf"
        )
    prepared = next((place for place in (model, adapters) if (place / "processor_config.json").is_file()), None)
    processor = None if prepared is None else processor_of(prepared)
    dtype = DTYPES.get(source.config.export.dtype)
    size = save_adapter(adapters, part, dtype, base, settings, processor)
    pruner = settings.get("pruner") or {"name": "none"}
    written = {"dtype": _name(dtype) if dtype else "auto", "weights_gb": size / 1e9, "base": base}
    return {**written, "pruner": pruner["name"]}, pruner, source.config.encoder.arch.get("model_type", "")


def _tower(source: Source) -> tuple[str, bool]:
    """Name of the vision tower, and whether the weights have to go into the checkpoint: they are not known to be those
    of that name."""
    found, named = source.found, source.config.export.vision_tower
    trained = source.config if found is None else found.trained
    own: dict[str, Any] = {}
    if source.run is None and (source.path / "config.json").is_file():
        own = read_config("ckpt", source.path / "config.json")
    tower = named or (trained.encoder.path if trained and source.run else own.get("mm_vision_tower"))
    if not tower:
        raise UserError(
            "export.format=llava: it is not known by which name LLaVA's code finds the vision tower; give "
            "export.vision_tower=NAME, a hub id such as openai/clip-vit-large-patch14-336, or a folder"
        )
    tower = public_name(tower)
    if own.get("mm_vision_tower"):
        other = found is not None and beside(found).encoder is not None
        return tower, bool(named) or other or bool(tower_tensors(weights_of("ckpt", source.path)))
    manifest = read_manifest(source.run) if source.run else None
    begun = [stage.get("start", {}) for stage in (manifest or {}).get("stages", {}).values()]
    untouched = manifest and "encoder" in manifest.get("base_weights", {}) and not any("key" in one for one in begun)
    frozen = trained is not None and not any(stage.train_vision for stage in trained.stage.values())
    return tower, bool(named) or not (untouched and frozen)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def _told(result: dict[str, Any]) -> str:
    rows = [
        [key, result[key]]
        for key in ("format", "dtype", "parameters", "weights_gb", "files", "pruner")
        if key in result
    ]
    if result.get("parity"):
        rows.append(["largest difference to the adapters unmerged", result["parity"]["largest_difference"]])
    return table(rows, ["exported", ""])
