"""What the model card of an export tells of the run that trained it: from its config, manifest and results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmprune_train.config.schema import Config
from mmprune_train.model.weights.places import public_name
from mmprune_train.reporting.comparison import comparison_text
from mmprune_train.reporting.model_card import Card
from mmprune_train.reporting.text import result_table
from mmprune_train.storage.files import read_json
from mmprune_train.storage.run_files import read_manifest
from mmprune_train.storage.secrets import masked_texts

TRAINED = ("train_projector", "train_llm", "train_vision")
RECIPE = (
    *("template", "lr", "projector_lr", "vision_lr", "global_batch_size", "epochs", "max_steps", "max_length"),
    "image_aspect_ratio",
)
REACHED = ("steps", "samples_used", "loss", "keep_ratio", "train_minutes")
"""Of the manifest's account of a stage."""
ENGINES = {
    "clip_vision_model": "vLLM reads a vision tower of this type; SGLang does in the layout of export.format=llava.",
    "siglip_vision_model": "vLLM reads a vision tower of this type.",
}
ONLY_EMBEDDED = (
    "vLLM and SGLang have no vision tower of this type; served with image embeddings the tower runs in the client "
    "(docs/serving.md)."
)


def card_facts(source: Any, written: Mapping[str, Any], settings: Mapping[str, Any], vision_type: str) -> Card:
    """What is known of an exported model.

    Args:
        source: the `Source` of the export.
        written: what the export's result has.
        settings: of the pruner that was saved with it.
        vision_type: of its vision tower.
    """
    run, config = source.run, source.config
    trained: Config | None = None if run is None else (source.found.trained if source.found else config)
    manifest = (read_manifest(run) if run else None) or {}
    made: dict[str, Any] = {"dtype": written["dtype"]}
    if parity := written.get("parity"):
        largest = f"{parity['largest_difference']:.1e} of {parity['largest_logit']:.2g}"
        made["largest difference of logits to the adapters unmerged"] = largest
    made |= {"seed": manifest.get("seed"), "git commit": manifest.get("git_commit"), **manifest.get("versions", {})}
    title = source.path.name if run is None else f"{manifest.get('experiment', run.parent.name)} {run.name}"
    return Card(
        title=title,
        format=config.export.format,
        license=config.export.license,
        bases=_bases(source, manifest),
        datasets=_datasets(trained, manifest),
        stages=_recipe(trained, manifest),
        pruner=dict(_flat(masked_texts(settings))) or {"name": "none"},
        metrics="\n\n".join(_evaluations(run, source.path.resolve().parent.name)),
        made={name: value for name, value in made.items() if value is not None},
        notes=(ENGINES.get(vision_type, ONLY_EMBEDDED),),
    )


def _bases(source: Any, manifest: Mapping[str, Any]) -> dict[str, str]:
    if source.run is None:
        return {"model": source.path.name}
    found = {
        part: f"{entry.get('name')}: {entry.get('source')}" for part, entry in manifest.get("base_weights", {}).items()
    }
    trained = source.found.trained if source.found else source.config
    for part in ("encoder", "llm"):
        path = getattr(trained, part).path
        if part in found and path and Path(path).name != manifest["base_weights"][part].get("source"):
            found[part] = public_name(path)  # the folder of a hub id has another name
    for name, stage in manifest.get("stages", {}).items():
        start = stage.get("start", {})
        if "key" in start:
            found[f"stage {name} from"] = f"{start['source']} ({start['kind']})"
    return found


def _datasets(config: Config | None, manifest: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, stage in manifest.get("stages", {}).items():
        data = stage.get("data", {})
        if config is not None and data:
            used = f", {data['used']:,} samples" if "used" in data else ""
            found[name] = f"{config.data.name}: {data.get('file')}{used}, SHA-256 {str(data.get('sha256'))[:12]}"
    return found


def _recipe(config: Config | None, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, state in manifest.get("stages", {}).items():
        if config is None or name not in config.stage:
            continue
        stage, peft = config.stage[name], config.peft
        row: dict[str, Any] = {"trained": ", ".join(key[6:] for key in TRAINED if getattr(stage, key))}
        if stage.use_peft and peft.name != "none":
            row["adapters"] = f"{peft.name}, r={peft.r}, alpha={peft.alpha}"
        row |= {key: getattr(stage, key) for key in RECIPE}
        row |= {"optimizer": config.optim.name, "schedule": config.optim.schedule}
        found[name] = row | {key: state[key] for key in REACHED if key in state}
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], {}):
            yield prefix + name, value


def _evaluations(run: Path | None, stage: str) -> Iterator[str]:
    """The tables of the evaluations of a run's training stage, by their folders' names; those that were moved aside are
    left out."""
    for file in sorted(run.glob("evaluate*/result.json")) if run else ():
        found = None if ".old" in file.parent.name else read_json(file)
        model = found and {**found.get("asked", {}), **found}.get("ckpt")
        if found is None or (model and Path(model).parent.name != stage):
            continue
        if "accuracy" in found:
            yield f"{file.parent.name} (pruner {found.get('pruner')})\n{result_table(found)}"
        elif "comparison" in found:
            pruner = f" (pruner {found['pruner']})" if "pruner" in found else ""
            yield f"{file.parent.name}{pruner}\n{comparison_text(found['comparison'])}"
