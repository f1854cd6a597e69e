"""Adapters on the LLM through PEFT: put on before a stage that trains them, saved and merged into the weights after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from mmprune_train.config.schema import PeftConfig
from mmprune_train.errors import NotFinite, UserError
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.lora import add_in_place
from mmprune_train.model.quantize import is_quantized, quantize_linears, weight_of

ADAPTER_FILE = "adapter_model.safetensors"
PROJECTOR_FILE = "projector.safetensors"


def linear_names(module: nn.Module) -> list[str]:
    """Last name parts of every Linear inside, e.g. q_proj, down_proj: LLaVA's LoRA targets."""
    return sorted({name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)})


def adapter_targets(hf: LlavaForConditionalGeneration, cfg: PeftConfig) -> list[str]:
    """Last name parts of the Linears that get adapters. Raises UserError for one that the LLM does not have."""
    known = linear_names(hf.model.language_model.layers)
    if unknown := sorted(set(cfg.target_modules) - set(known)):
        raise UserError(f"peft.target_modules: this LLM has no {', '.join(unknown)}; it has {', '.join(known)}")
    return list(cfg.target_modules) or known


def add_adapters(model: PackedLlava, cfg: PeftConfig, quantize: torch.dtype | None = None) -> None:
    """Put LoRA (Hu et al. 2021), DoRA (Liu et al. 2024) or QLoRA (Dettmers et al. 2023) on the LLM's decoder layers, in
    place, all else frozen.

    Args:
        quantize: with `qlora`, take the weights of the decoder layers to 4 bits and compute in this dtype; None: leave
            them as they are, for counting.
    Raises:
        UserError: a target module does not exist.
    """
    if cfg.name == "none":
        return
    layers, targets = model.hf.model.language_model.layers, adapter_targets(model.hf, cfg)
    lora = LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        bias="none",
        target_modules=rf".*language_model\.layers\..*\.({'|'.join(targets)})",
        use_dora=cfg.name == "dora",
    )
    if cfg.name == "qlora" and quantize is not None:
        quantize_linears(layers, quantize)
        model.hf.is_loaded_in_4bit = True  # PEFT asks for it before it adapts such a Linear
    get_peft_model(model.hf, lora)  # puts the adapters into model.hf's own modules
    add_in_place(layers)


def save_adapters(model: PackedLlava, folder: Path, base: str | None) -> None:
    """Write what a LoRA stage trained as PEFT writes it, for `PeftModel.from_pretrained(base model, folder)`, and the
    projector's weights beside it. adapter_config.json names `base`, the Hugging Face folder that the stage started
    from, if any."""
    config = model.hf.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    found = get_peft_model_state_dict(model.hf, save_embedding_layers=False)
    _save({f"base_model.model.{name}": weight for name, weight in found.items()}, folder / ADAPTER_FILE)
    config.save_pretrained(str(folder))
    _save(model.hf.model.multi_modal_projector.state_dict(), folder / PROJECTOR_FILE)


def merge_adapters(hf: LlavaForConditionalGeneration) -> None:
    """Fold the adapters into the weights they adapt, in place, leaving plain Linear layers with Hugging Face's keys.

    4-bit weights are taken out of their 4 bits, the layers without adapters, too. What was rounded when they were
    quantised stays rounded.
    """
    language = hf.model.language_model
    for name, part in list(language.named_modules()):
        if isinstance(part, BaseTunerLayer):
            language.set_submodule(name, _merged(part))
    for name, part in list(language.named_modules()):
        if isinstance(part, nn.Linear) and is_quantized(part):
            language.set_submodule(name, _plain(part))
    for leftover in ("peft_config", "_hf_peft_config_loaded", "is_loaded_in_4bit"):  # save_pretrained would heed them
        hf.__dict__.pop(leftover, None)


def _merged(layer: Any) -> nn.Module:
    base = layer.get_base_layer()
    if not is_quantized(base):
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise NotFinite(f"the adapters cannot be merged, the sum is not finite: {error}") from error
        return base
    plain = _plain(base)  # PEFT's own merge would quantise the sum again
    for adapter in layer.active_adapters:
        delta = layer.get_delta_weight(adapter)
        plain.weight.data = (plain.weight.float() + delta.float()).to(plain.weight.dtype)
    return plain


def _plain(linear: Any) -> nn.Linear:
    weight = weight_of(linear)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = linear.bias
    return plain


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
