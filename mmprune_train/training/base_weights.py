"""Which weights a run started from, for its manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmprune_train.config.pruner import reads_text
from mmprune_train.config.schema import Config
from mmprune_train.model.weights import encoder_folder, llm_folder, text_folder

WEIGHTS = ("*.safetensors", "*.bin")


def describe(config: Config) -> dict[str, dict[str, str]]:
    """For `encoder` and `llm`, and for `text` where the pruner reads the question: name, source, and the SHA-256 of its
    weight files in name order."""
    folders = {"encoder": encoder_folder(config.encoder), "llm": llm_folder(config.llm)}
    names = {"encoder": config.encoder.name, "llm": config.llm.name, "text": f"text tower of {config.encoder.name}"}
    if config.encoder.text is not None and reads_text(config.pruner.vision):
        folders["text"] = text_folder(config.encoder.text)
    described = {}
    for part, folder in folders.items():
        if folder is None:
            described[part] = {"name": names[part], "source": f"random, seed {config.seed}"}
        else:
            described[part] = {"name": names[part], "source": folder.name, "sha256": folder_hash(folder)}
    return described


def folder_hash(folder: Path) -> str:
    """SHA-256 over all weight files of a Hugging Face folder."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
