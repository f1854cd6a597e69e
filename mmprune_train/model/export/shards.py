"""Weights as safetensors: one file, or numbered ones with their index, as transformers and engines look for them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.progress import progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROOM = "make room there, name another place, or give export.dtype=bf16"
BESIDE = 64 << 20
"""Bytes for what lies beside the weights: tokenizer, configs, the model card."""


def write_shards(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Write these tensors, floating ones in `dtype`, and return their bytes.

    Args:
        shard_bytes: most bytes of a file; a larger tensor has one of its own.
    Raises:
        UserError: there is no room on the disk, or a value is too large for the dtype.
    """
    outline = {
        name: torch.empty_like(value, dtype=_cast(value, dtype), device="meta") for name, value in tensors.items()
    }
    plan = split_torch_state_dict_into_shards(
        outline, max_shard_size=shard_bytes, filename_pattern="model{suffix}.safetensors"
    )
    size = sum(value.numel() * value.element_size() for value in outline.values())
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, size)
    for file, names in progress(plan.filename_to_tensors.items(), "writing", "files"):
        part = {}
        for name in names:
            value = tensors[name].detach().to("cpu", _cast(tensors[name], dtype)).contiguous()
            if dtype == torch.float16 and not bool(value.isfinite().all()) and bool(tensors[name].isfinite().all()):
                raise UserError(f"export.dtype=fp16: {name} has values that fp16 does not hold; take bf16 or fp32")
            part[name] = value
        try:
            save_file(part, folder / file, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise UserError(f"export.out: the disk is full ({file} of {size / 1e9:.1f} GB); {ROOM}") from error
    if plan.is_sharded:
        index = {"metadata": {"total_size": size}, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return size


def _cast(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.is_floating_point() else value.dtype


def check_room(folder: Path, size: int) -> None:
    """Raise UserError where the disk of a folder has no room for so many bytes of weights."""
    free = shutil.disk_usage(folder).free
    if free < size + BESIDE:
        raise UserError(
            f"export.out: the disk has {free / 1e9:.1f} GB free, {(size + BESIDE) / 1e9:.1f} GB are needed; {ROOM}"
        )
