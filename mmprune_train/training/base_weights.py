"""Which weights a run and its stages started from, for its manifest: the frozen ones are in no checkpoint, so a resumed
run must find the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.weights.base import hash_of, weight_files
from mmprune_train.model.weights.places import base_folder
from mmprune_train.storage.files import stamp_of

LONG = 4 << 30
"""Bytes whose hashing takes long enough for a line on the terminal."""

Entry = dict[str, Any]
"""Of one part: name, source, and where it has files their SHA-256 and by what they are known (`stamps`)."""


def base_weights(config: Config, recorded: Mapping[str, Entry], parts: Collection[str]) -> dict[str, Entry]:
    """What is to be recorded of `encoder` and `llm`, and of `text` where the pruner reads the question.

    Args:
        recorded: what the manifest has of them.
        parts: those that what is trained starts from.
    Raises:
        UserError: a part is not what the run was begun with.
    """
    encoder, llm, tower = config.encoder, config.llm, config.encoder.text
    find: dict[str, tuple[str, Callable[[], Path | None]]] = {
        "encoder": (encoder.name, lambda: base_folder(encoder)),
        "llm": (llm.name, lambda: base_folder(llm)),
        "text": (f"text tower of {encoder.name}", lambda: None if tower is None else base_folder(tower)),
    }
    entries = dict(recorded)
    for part, (name, get) in find.items():
        if part in parts:
            random = {"source": f"random, seed {config.seed}"}
            found = unchanged(part, folder, recorded.get(part)) if (folder := get()) else random
            entries[part] = {"name": name, **found}
    return entries


def unchanged(
    part: str, folder: Path, recorded: Mapping[str, Any] | None, files: Sequence[Path] | None = None
) -> Entry:
    """Source, hash and stamps of the weights in a folder.

    The files are read, unless each is the very file that was: by place, size, inode and both times, of which a copy has
    a new one even where it keeps the old date.

    Args:
        part: what they are, for the message.
        recorded: the same of an earlier start.
        files: of weights; None: those of a Hugging Face folder.
    Raises:
        UserError: they are not those recorded.
    """
    files = weight_files(folder) if files is None else files
    stamps = {file.name: stamp_of(file) for file in files}
    recorded = recorded or {}
    if "sha256" in recorded and recorded.get("stamps") == stamps:
        return {"source": folder.name, "sha256": recorded["sha256"], "stamps": stamps}
    if (size := sum(file.stat().st_size for file in files)) >= LONG:
        print(f"reading the weights of {part} for their checksum ({size / 1e9:.1f} GB)", flush=True)
    found = hash_of(files)
    if recorded.get("sha256", found) != found:
        raise UserError(
            f"{part}: the weights in {folder} have SHA-256 {found[:12]}..., this run began with "
            f"{recorded['sha256'][:12]}... ({recorded.get('source')}), and its checkpoints hold the trained weights "
            "alone: put those back, or start a new run with run_id= or restart=true"
        )
    return {"source": folder.name, "sha256": found, "stamps": stamps}
