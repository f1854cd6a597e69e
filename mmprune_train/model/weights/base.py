"""Which weights adapters belong to, by their content: recorded beside them, or by the run that trained them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mmprune_train.errors import UserError
from mmprune_train.model.weights.files import read_config
from mmprune_train.model.weights.folders import ADAPTER_CONFIG
from mmprune_train.storage.files import stamp_of
from mmprune_train.storage.run_files import read_manifest

WEIGHTS = ("*.safetensors", "*.bin")
RECORD = "base.json"
"""Of exported adapters: `base`, by part (`model`, or `encoder` and `llm`) the SHA-256 of its weight files and the name
of their folder; and what `load_model` finds in a model's config.json."""

Base = dict[str, dict[str, str]]


def weight_files(folder: Path) -> list[Path]:
    """Of a Hugging Face folder, by name."""
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))


def hash_of(files: Sequence[Path]) -> str:
    """SHA-256 over files one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def record_of(key: str, folder: Path) -> dict[str, Any]:
    """What lies in the record beside exported adapters; empty where there is none."""
    return read_config(key, folder / RECORD) if (folder / RECORD).is_file() else {}


def base_of(key: str, folder: Path) -> Base:
    """The base of an adapter folder as it was recorded; empty where nobody has."""
    if found := record_of(key, folder).get("base"):
        return dict(found)
    manifest = read_manifest(folder.parent.parent) or {}
    start = manifest.get("stages", {}).get(folder.parent.name, {}).get("start", {})
    start = start.get("base", {}) if start.get("adapters") == "continue" else start
    whole = start.get("sha256") and start.get("kind") != "projector"
    parts = {"model": start} if whole else manifest.get("base_weights", {})
    return {
        part: {"sha256": entry["sha256"], "source": str(entry["source"])}
        for part, entry in parts.items()
        if part in ("model", "encoder", "llm") and entry.get("sha256")
    }


def check_base(key: str, folder: Path, recorded: Base, parts: Mapping[str, Path | None]) -> None:
    """Raise UserError where adapters are to go on other weights than those that they were trained on, or a part of
    those is not here.

    Args:
        recorded: the base that `base_of` tells.
        parts: folders of the base by part; None: random weights.
    """
    for part, known in recorded.items():
        there = parts.get(part)
        if there is None:
            named = f"base_model_name_or_path in its {ADAPTER_CONFIG}"
            remedy = f"name its folder as {named}" if part == "model" else f"give {part}.path=FOLDER ({named}: null)"
            raise UserError(
                f"{key}: the adapters in {folder} were trained on the {part} {known['source']} with SHA-256 "
                f"{known['sha256'][:12]}..., and they would go on another without it: {remedy}"
            )
        if (found := _hash_once(*map(_stamp, weight_files(there)))) != known["sha256"]:
            raise UserError(
                f"{key}: the adapters in {folder} were trained on {known['source']} with SHA-256 "
                f"{known['sha256'][:12]}..., and {there} has {found[:12]}...: give the weights that they belong to"
            )


def _stamp(file: Path) -> tuple[Any, ...]:
    return tuple(stamp_of(file))


@cache
def _hash_once(*stamps: tuple[Any, ...]) -> str:
    """Of files that are as they were when this process read them."""
    return hash_of([Path(stamp[0]) for stamp in stamps])
