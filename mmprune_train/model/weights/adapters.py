"""Adapter folders in PEFT's format: what they adapt, and how training goes on from them or folds them in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedConfig

from mmprune_train.config.schema import PeftConfig
from mmprune_train.errors import UserError
from mmprune_train.model.peft import ADAPTER_FILE, PROJECTOR_FILE, linear_names, merge_adapters
from mmprune_train.model.weights.files import Tensors, read_config, read_tensors, tensors_of
from mmprune_train.model.weights.folders import ADAPTER_CONFIG
from mmprune_train.model.weights.original import projector_tensors
from mmprune_train.storage.run_files import check_saved

ADAPTER_BIN, NON_LORA = "adapter_model.bin", "non_lora_trainables.bin"
_NAME = re.compile(r"^(.*?)(layers\.\d+\..+?\.(?:lora_A|lora_B|lora_magnitude_vector))(?:\.default)?(?:\.weight)?$")
"""What adapts, as PEFT's files and a model's parameters name it: what is before the decoder layers, and the place."""


def adapter_tensors(key: str, folder: Path) -> Tensors:
    """The adapters' weights by their place in the LLM, e.g. `layers.0.self_attn.q_proj.lora_A`.

    Raises UserError where there are none, or some adapt something else than the LLM's decoder layers.
    """
    files = [folder / name for name in (ADAPTER_FILE, ADAPTER_BIN) if (folder / name).is_file()]
    if not files:
        raise UserError(f"{key}: {folder} has {ADAPTER_CONFIG}, but no {ADAPTER_FILE}; copy that file, too")
    found: Tensors = {}
    for name, entry in tensors_of(key, files[0]).items():
        match = _NAME.match(name)
        if match is None or "vision" in match.group(1) or "projector" in match.group(1):
            raise UserError(f"{key}: {files[0]} adapts {name}; only LoRA on the LLM's decoder layers can be taken up")
        found[match.group(2)] = entry
    return found


def projector_beside(key: str, folder: Path) -> Tensors:
    """The projector's weights that lie with the adapters, by transformers' names; empty where there is none."""
    if (folder / PROJECTOR_FILE).is_file():
        return tensors_of(key, folder / PROJECTOR_FILE)
    if not (folder / NON_LORA).is_file():
        return {}
    found = projector_tensors(tensors_of(key, folder / NON_LORA))
    if not found:
        raise UserError(f"{key}: {folder / NON_LORA} holds something else than a projector, which is not supported")
    return found


def check_adapters(key: str, folder: Path) -> None:
    """Raise UserError for adapters of a kind that cannot be taken up, or that are not as their stage left them."""
    check_saved(key, folder)
    config = read_config(key, folder / ADAPTER_CONFIG)
    usual: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none",), "modules_to_save": (None, [])}
    if wrong := [
        f"{name}={config[name]}" for name, values in usual.items() if config.get(name, values[0]) not in values
    ]:
        raise UserError(
            f"{key}: {folder} holds adapters with {', '.join(wrong)}; only LoRA and DoRA weights can be taken up: "
            "merge them into their model with PEFT, and start from that"
        )


def differs(key: str, folder: Path, peft: PeftConfig, llm: PreTrainedConfig) -> list[str]:
    """Settings of a stage's adapters on `llm` that are not those of the folder, as `peft.r=8 (the folder: 16)`; empty:
    training can go on with the folder's own."""
    config = read_config(key, folder / ADAPTER_CONFIG)
    asked = {"peft.name": peft.name, "peft.r": peft.r, "peft.alpha": peft.alpha}
    plain = ("lora", "qlora")  # the same adapters on other base weights
    theirs = "dora" if config.get("use_dora") else peft.name if peft.name in plain else "lora"
    there = {"peft.name": theirs, "peft.r": config.get("r"), "peft.alpha": config.get("lora_alpha")}
    found = [f"{name}={asked[name]} (the folder: {there[name]})" for name in asked if asked[name] != there[name]]
    for name in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            found.append(f"the folder's {name}={config[name]}")
    with torch.device("meta"):
        layers: nn.Module = AutoModelForCausalLM.from_config(llm).model.layers
    targets = set(peft.target_modules or linear_names(layers))
    linears = [name for name, part in layers.named_modules() if isinstance(part, nn.Linear)]
    wanted = {name for name in linears if name.rpartition(".")[2] in targets}
    adapted = {name.split(".", 1)[1].rsplit(".", 1)[0] for name in adapter_tensors(key, folder)}
    if targets != (modules := {name.rpartition(".")[2] for name in adapted}):
        found.append(f"peft.target_modules={sorted(targets)} (the folder: {sorted(modules)})")
    elif other := sorted(wanted ^ adapted):
        found.append(f"the folder's adapters on a part of the layers alone (not on {other[0]})")
    return found


def load_adapters(hf: LlavaForConditionalGeneration, key: str, folder: Path) -> None:
    """Put the folder's weights into the adapters that are on the LLM, in place.

    Raises UserError where they do not fit one to one.
    """
    values = read_tensors(adapter_tensors(key, folder))
    here: dict[str, Tensor] = {}
    for name, parameter in hf.model.language_model.named_parameters():
        if match := _NAME.match(name):
            here[match.group(2)] = parameter
    wrong = sorted(values.keys() ^ here.keys()) or [n for n in values if values[n].shape != here[n].shape]
    if wrong:
        raise UserError(
            f"{key}: the adapters in {folder} do not fit this LLM and its peft settings ({wrong[0]} and "
            f"{len(wrong) - 1} more); choose the llm= they were trained on, peft.target_modules as there, or "
            "init_adapters=merge"
        )
    with torch.no_grad():
        for name, value in values.items():
            here[name].copy_(value)


def merge_folder(hf: LlavaForConditionalGeneration, key: str, folder: Path) -> None:
    """Fold the adapters of a folder into the LLM's weights, in place."""
    put_on(hf, key, folder)
    merge_adapters(hf)


def put_on(hf: LlavaForConditionalGeneration, key: str, folder: Path) -> None:
    """Put the adapters of a folder on the LLM, in place, its weights left as they are."""
    settings: dict[str, Any] = read_config(key, folder / ADAPTER_CONFIG)
    places = sorted({name.rsplit(".", 1)[0] for name in adapter_tensors(key, folder)})
    kept = ("r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    lora = LoraConfig(
        **{name: settings[name] for name in kept if settings.get(name) is not None},
        target_modules=[f"model.language_model.{place}" for place in places],
        bias="none",
    )
    try:
        get_peft_model(hf, lora)
    except ValueError as error:
        raise UserError(f"{key}: {folder} adapts layers that this LLM does not have ({str(error)[:120]})") from None
    load_adapters(hf, key, folder)
