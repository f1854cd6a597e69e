"""Adapters on the LLM through PEFT: put on before a stage that trains them, merged into the weights after it."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmprune_train.config.schema import PeftConfig
from mmprune_train.errors import UserError
from mmprune_train.model.llava import PackedLlava


def linear_names(module: nn.Module) -> list[str]:
    """Last name parts of every Linear inside, e.g. q_proj, down_proj: LLaVA's LoRA targets."""
    return sorted({name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)})


def add_adapters(model: PackedLlava, cfg: PeftConfig) -> None:
    """Put LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024) on the LLM's decoder layers, in place, all else frozen.

    Raises UserError where a target module does not exist.
    """
    if cfg.name == "none":
        return
    layers = model.hf.model.language_model.layers
    known = linear_names(layers)
    targets = list(cfg.target_modules) or known
    if unknown := sorted(set(targets) - set(known)):
        raise UserError(f"peft.target_modules: this LLM has no {', '.join(unknown)}; it has {', '.join(known)}")
    lora = LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        bias="none",
        target_modules=rf".*language_model\.layers\..*\.({'|'.join(targets)})",
        use_dora=cfg.name == "dora",
    )
    get_peft_model(model.hf, lora)  # puts the adapters into model.hf's own modules


def has_adapters(model: PackedLlava) -> bool:
    """Whether adapters are on the LLM."""
    return any(isinstance(part, BaseTunerLayer) for part in model.hf.modules())


def merge_adapters(model: PackedLlava) -> None:
    """Fold the adapters into the weights they adapt, in place, leaving plain Linear layers with Hugging Face's keys."""
    language = model.hf.model.language_model
    for name, part in list(language.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge(safe_merge=True)
            parent = language.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], part.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):  # marks that would make save_pretrained save adapters
        model.hf.__dict__.pop(leftover, None)
