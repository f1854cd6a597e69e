"""What a folder of weights is, from its config.json and file headers, before anything of it is loaded: a wrong one is
named with the key that gave it and what to do instead."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers import AutoHfQuantizer

from mmprune_train.errors import UserError
from mmprune_train.model.vision import FAMILIES
from mmprune_train.model.weights.auto import config_of, retold
from mmprune_train.model.weights.files import (
    Tensors,
    check_small_files,
    read_config,
    refuse_broken_links,
    weights_of,
)
from mmprune_train.model.weights.original import BESIDE_LLM, text_config
from mmprune_train.model.weights.outline import check_outline
from mmprune_train.storage.run_files import check_saved, read_manifest

ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR_BIN = "mm_projector.bin"

LLAVA, ORIGINAL, LANGUAGE, ENCODER, CLIP = "llava", "original", "language", "encoder", "clip"
ADAPTERS, PROJECTOR, RUN, GGUF, OTHER, NOTHING = "adapters", "projector", "run", "gguf", "other", "nothing"

BOTH_TOWERS = ("clip", "siglip")
"""Checkpoints of an encoder with its text tower; `encoder.path` takes them, too."""

NOUNS = {
    LLAVA: "a whole LLaVA (llava-hf format)",
    ORIGINAL: "a checkpoint in the original LLaVA format",
    LANGUAGE: "a plain language model",
    ENCODER: "a vision encoder",
    CLIP: "a vision encoder with its text tower",
    ADAPTERS: "adapters without the model they belong to",
    PROJECTOR: "a projector alone",
    RUN: "a run of this project",
    GGUF: "GGUF weights",
    NOTHING: "no model (it has no config.json)",
}
WANTED = {
    "llm": ((LANGUAGE,), "a language model (config.json of a causal LM, weights, tokenizer)"),
    "encoder": ((ENCODER, CLIP), "a vision encoder (CLIP, SigLIP, DINOv2, ViT)"),
    "text": ((CLIP,), "the whole CLIP checkpoint, with both towers"),
    "llava": ((LLAVA,), "a run directory, an exported folder, a llava-hf folder or an original LLaVA checkpoint"),
}
"""What a key may want: the kinds that are it, and the words for them."""
KEYS_OF = {LANGUAGE: "llm.path", ENCODER: "encoder.path", CLIP: "encoder.path"}

KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys of a config.json for which transformers would fetch a kernel from the hub and run it."""


MOST_BEAMS = 64
"""Of a beam search. Our choice: each is a copy of the cache."""


@dataclass(frozen=True)
class Folder:
    """A folder that was looked at."""

    path: Path
    kind: str
    config: dict[str, Any]
    """config.json; empty where there is none."""


def look(key: str, path: Path) -> Folder:
    """What the folder that `key` gave holds. Raises UserError where it cannot be read, or its config.json is broken."""
    refuse_broken_links(key, path)
    if (path / "manifest.json").is_file():
        return Folder(path, RUN, {})
    if (path / ADAPTER_CONFIG).is_file():
        return Folder(path, ADAPTERS, read_config(key, path / ADAPTER_CONFIG))
    if (path / "config.json").is_file():
        config = read_config(key, path / "config.json")
        kind = _kind(config)
        weights = [*path.glob("model*.safetensors*"), *path.glob("pytorch_model*.bin*")]
        if kind == ORIGINAL and (path / PROJECTOR_BIN).is_file() and not weights:
            kind = PROJECTOR  # what LLaVA's first training stage leaves
        return Folder(path, kind, config)
    if (path / PROJECTOR_BIN).is_file():
        return Folder(path, PROJECTOR, {})
    return Folder(path, GGUF if any(path.glob("*.gguf")) else NOTHING, {})


def _kind(config: dict[str, Any]) -> str:
    model_type = str(config.get("model_type", ""))
    parts = isinstance(config.get("text_config"), dict) or isinstance(config.get("vision_config"), dict)
    if not parts and (model_type.startswith("llava") or "mm_vision_tower" in config or "mm_projector_type" in config):
        return ORIGINAL
    if model_type == "llava":
        return LLAVA
    if model_type in FAMILIES:
        return ENCODER
    if model_type in BOTH_TOWERS:
        return CLIP
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "vision_config" not in config:
        return LANGUAGE
    return OTHER


def check_folder(key: str, path: Path, wanted: str, trains: bool = True) -> Tensors:
    """`check_whole` of a folder that holds what its key wants, by a name of `WANTED`; UserError where it does not."""
    found = look(key, path)
    kinds, words = WANTED[wanted]
    if found.kind not in kinds:
        raise UserError(f"{key}: {path} holds {unfit(found)}, where {words} is wanted{_instead(found, wanted)}")
    return check_whole(key, found, trains)


def check_whole(key: str, found: Folder, trains: bool = True) -> Tensors:
    """The tensors of a model folder. Raises UserError where files are missing or damaged, weights are quantised (with
    `trains`: at all), or the architecture or the tokenizer is not one of transformers."""
    check_saved(key, found.path)
    check_small_files(key, found.path)
    _check_code(key, found)
    if found.kind in (LANGUAGE, LLAVA):
        _check_language(key, found)
        _check_generation(key, found)
    tensors = weights_of(key, found.path)
    _check_quantisation(key, found, tensors, trains)
    if not _quantisation(found.config) and found.kind in (LANGUAGE, LLAVA, ORIGINAL):
        _check_outline(key, found, tensors)
    return tensors


def unfit(found: Folder) -> str:
    """What a folder of the wrong kind holds, and why a model of no known kind is none."""
    if found.kind != OTHER:
        return NOUNS[found.kind]
    words = f"a model of type {found.config.get('model_type', '(not given)')!r}"
    known = str(found.config.get("model_type")) in CONFIG_MAPPING_NAMES
    if "auto_map" in found.config and not known:
        return f"{words}, which needs code of its own (auto_map) that is never run here"
    if "model_type" in found.config and not known:
        return f"{words}, which transformers {version('transformers')} does not know"
    return words


def _instead(found: Folder, wanted: str) -> str:
    if found.kind in (LLAVA, ORIGINAL, ADAPTERS, PROJECTOR, RUN):
        what = {"llm": "the LLM alone", "encoder": "the encoder alone", "text": "the CLIP that the encoder comes from"}
        return f"; to start a training from it give init_from={found.path}, or give {what.get(wanted, 'its model/')}"
    if found.kind in KEYS_OF:
        return f"; give this folder as {KEYS_OF[found.kind]}, and another here"
    if found.kind == GGUF:
        return "; give the folder of the unquantised checkpoint (safetensors)"
    return "; correct the path"


def _check_code(key: str, found: Folder) -> None:
    """Weights come without code: what needs its own is refused before transformers would ask whether to run it."""
    for part in (found.config, *(value for value in found.config.values() if isinstance(value, dict))):
        kernels = [str(part[name]) for name in KERNELS if "/" in str(part.get(name))]
        if kernels:
            raise UserError(
                f"{key}: {found.path}/config.json asks for a kernel of the hub ({kernels[0]}), code that is never run "
                "here; take attn_implementation (or experts_implementation) out of it"
            )
    file = found.path / "tokenizer_config.json"
    if found.kind in (LANGUAGE, LLAVA, ORIGINAL) and file.is_file():
        import transformers

        settings = read_config(key, file)
        own = "AutoTokenizer" in (settings.get("auto_map") or {})
        name = str(settings.get("tokenizer_class", ""))
        if own and not (hasattr(transformers, name) or hasattr(transformers, f"{name}Fast")):
            raise UserError(
                f"{key}: the tokenizer of {found.path} needs code of its own ({name}, auto_map), which is never run "
                "here; where it has a tokenizer.json, set tokenizer_class to PreTrainedTokenizerFast in "
                "tokenizer_config.json and take auto_map out"
            )


def _check_language(key: str, found: Folder) -> None:
    from mmprune_train.model.language import check_language_model

    try:
        config: Any = config_of(found.path)
        check_language_model(getattr(config, "text_config", config))
    except UserError as error:
        raise UserError(f"{key}: {found.path}: {error}") from None
    except Exception as error:  # every architecture checks its config with exceptions of its own
        told = f"{key}: {found.path}/config.json is no config that transformers takes ({_said(error)})"
        raise UserError(f"{told}; correct it, or copy it again") from None


def _check_generation(key: str, found: Folder) -> None:
    """How a model generates when nobody says otherwise: what transformers fails on only when it does."""
    file = found.path / "generation_config.json"
    if not file.is_file():
        return
    settings = read_config(key, file)
    with retold(lambda error: f"{key}: {file} is no config that transformers takes ({_said(error)}); correct it"):
        GenerationConfig.from_dict(settings)
    for name, value in settings.items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and not all(type(one) is int for one in ids if one is not None):
            raise UserError(f"{key}: {file} has {name}={value!r}, which is no token's number; correct it")
    if (several := settings.get("num_return_sequences") or 1) != 1:
        raise UserError(f"{key}: {file} asks for several answers (num_return_sequences={several}); take it out")
    if type(beams := settings.get("num_beams") or 1) is not int or not 1 <= beams <= MOST_BEAMS:
        raise UserError(f"{key}: {file} has num_beams={beams}; give 1 to {MOST_BEAMS}, or take it out")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _check_outline(key: str, found: Folder, tensors: Tensors) -> None:
    source = f"{key}: {found.path}"
    told = f"{source}/config.json describes no model that transformers can make"
    with retold(lambda error: f"{told} ({_said(error)}); correct it"):
        if found.kind == ORIGINAL:
            check_outline(source, text_config(key, found.config), tensors, BESIDE_LLM)
        else:
            check_outline(source, config_of(found.path), tensors)


def _quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of how its weights are quantised; empty where it says nothing."""
    parts = [config, *(part for part in map(config.get, ("text_config", "vision_config")) if isinstance(part, dict))]
    settings = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    return settings if isinstance(settings, dict) else {}


def _way_by_tensors(tensors: Tensors) -> str | None:
    """Of weights whose config.json says nothing."""
    for name, entry in tensors.items():
        if name.endswith((".qweight", ".qzeros")):
            return "awq or gptq"
        if name.endswith((".weight.absmax", ".SCB")):
            return "bitsandbytes"
        if "F8_" in entry.dtype or "float8" in entry.dtype:
            return "fp8"
        if name.endswith(".weight") and "F" not in entry.dtype and "float" not in entry.dtype:
            return entry.dtype
    return None


def _check_quantisation(key: str, found: Folder, tensors: Tensors, trains: bool) -> None:
    settings = _quantisation(found.config)
    way = _way_by_tensors(tensors)
    if settings:
        way = settings.get("quant_method") or ("bitsandbytes" if any("load_in" in name for name in settings) else "?")
    why = "such weights cannot be trained" if trains else _unread(settings)
    if way is None or why is None:
        return
    more = " (peft=qlora takes them to 4 bits itself)" if found.kind == LANGUAGE and trains else ""
    raise UserError(
        f"{key}: {found.path} holds weights quantised by {way}, and {why}; give the checkpoint in bf16, fp16 or "
        f"fp32{more}"
    )


def _unread(settings: dict[str, Any]) -> str | None:
    """Why transformers cannot read weights quantised like this; None: it can."""
    if not settings:
        return "their config.json does not say how"
    try:
        AutoHfQuantizer.from_config(settings).validate_environment()
    except Exception as error:  # a library or a device that it needs, or whatever wrong settings lead to
        return f"transformers cannot read them here ({_said(error)})"
    return None


def is_hub_id(path: str) -> bool:
    """Whether this may be `owner/name`, and is not written as a folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def model_folder(path: str | Path, key: str = "") -> Path | str:
    """The folder behind a run directory, an exported folder or a hub id that `key` gave; a projector's file itself."""
    folder, named = Path(path).expanduser(), f"{key}: {path}" if key else f"{path}"
    if folder.is_file() and folder.suffix == ".bin":  # a projector alone
        return folder
    if (manifest := read_manifest(folder)) is not None:
        for name in reversed(manifest.get("stages", {})):
            if (folder / name / "model" / "config.json").is_file():
                return folder / name / "model"
        raise UserError(f"{named}: no stage of this run has finished; run the same training command to continue it")
    if folder.is_dir():
        inside = folder / "model"  # of a training stage
        return inside if (inside / "config.json").is_file() and not (folder / "config.json").is_file() else folder
    if not is_hub_id(str(path)):
        raise UserError(f"{named}: no such folder; give a run directory, an exported folder or a llava-hf folder")
    return str(path)
