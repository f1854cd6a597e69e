"""Whether weights to start from fit the chosen encoder, LLM and projector: all that differs, before it is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mmprune_train.config.schema import Config, EncoderConfig, LlmConfig
from mmprune_train.errors import UserError
from mmprune_train.model.arch import arch_config
from mmprune_train.model.tokenizer import IMAGE_TOKEN, load_tokenizer
from mmprune_train.model.vision import feature_indices
from mmprune_train.model.weights.auto import config_of
from mmprune_train.model.weights.files import Tensors, read_config
from mmprune_train.model.weights.folders import ADAPTERS, LLAVA, ORIGINAL, PROJECTOR, Folder, is_hub_id
from mmprune_train.model.weights.original import projector_tensors, text_config, tower_tensors, unsupported

TEXT = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)
VISION = (
    *("model_type", "hidden_size", "intermediate_size", "mlp_ratio", "num_hidden_layers", "num_attention_heads"),
    "patch_size",
)
"""Fields of transformers' configs that must be as in `llm.arch` and `encoder.arch`."""
GROWN = 128
"""A vocabulary may be larger than the chosen LLM's by this many: `<image>`, and rounding up."""

Difference = tuple[str, Any, Any]
"""Key with its part (`llm.arch.hidden_size`), the chosen value, the value of the source."""


def check_fit(config: Config, key: str, found: Folder, tensors: Tensors) -> None:
    """Raise UserError that names every key with both values where a source that `key` gave does not fit what is chosen.
    Tensors of adapters are by `adapter_tensors`' names."""
    different = list(_COMPARED[found.kind](config, key, found, tensors))
    if different:
        told = "; ".join(f"{name}={chosen}, there {there}" for name, chosen, there in different)
        raise UserError(
            f"{key}: {found.path} does not fit what is chosen: {told}; choose the encoder=, llm= and projector= that "
            "it was made of, or set these keys to its values"
        )


def _llava(config: Config, key: str, found: Folder, tensors: Tensors) -> Iterator[Difference]:
    there: Any = config_of(found.path)
    encoder, vision = config.encoder, there.vision_config
    trained: Any = chosen_config(encoder)
    yield from _language(config.llm, there.text_config)
    yield from _differences("encoder", trained, vision, VISION)
    if vision.image_size != trained.image_size:  # of DINOv2 that of its position embeddings, which are interpolated
        yield "encoder.arch.image_size", trained.image_size, vision.image_size
    elif there.image_seq_length != encoder.patches:
        yield "visual tokens of an image (encoder.image_size)", encoder.patches, there.image_seq_length
    yield from _features(encoder, there.vision_feature_layer, there.vision_feature_select_strategy == "default", vision)
    act = there.projector_hidden_act
    kind = "mlp2x_gelu" if act == "gelu" else act
    if kind != config.projector.name:
        yield "projector.name", config.projector.name, kind
    image = load_tokenizer(found.path, key).convert_tokens_to_ids(IMAGE_TOKEN)
    if image != there.image_token_id:
        yield f"the tokenizer's {IMAGE_TOKEN} (config.json's image_token_index)", image, there.image_token_id
    yield from _preparation(encoder, key, found.path)


def _original(config: Config, key: str, found: Folder, tensors: Tensors) -> Iterator[Difference]:
    own = found.config
    if wrong := unsupported(own, tensors):
        raise UserError(
            f"{key}: {found.path} was trained with {', '.join(wrong)}, which is not supported; LLaVA-1.5's "
            "checkpoints are without"
        )
    text: Any = text_config(key, own)
    yield from _language(config.llm, text)
    encoder = config.encoder
    blocks = encoder.arch.get("num_hidden_layers", 0)
    chosen: Any = chosen_config(encoder)
    if own.get("mm_hidden_size", encoder.arch.get("hidden_size")) != chosen.hidden_size:
        yield "encoder.arch.hidden_size", chosen.hidden_size, own["mm_hidden_size"]
    drops_cls = own.get("mm_vision_select_feature", "patch") == "patch"
    yield from _features(encoder, own.get("mm_vision_select_layer", -2), drops_cls or not encoder.has_cls, chosen)
    tower = tower_tensors(tensors)
    named, asked = str(own.get("mm_vision_tower") or ""), encoder.path or ""
    hub_ids = [path for path in (named, asked) if is_hub_id(path) and not Path(path).exists()]
    if not tower and len({path.split("/")[1] for path in hub_ids}) == 2:
        yield "encoder.path", asked, named
    patch = next((e.shape for n, e in tower.items() if n.endswith("patch_embedding.weight")), None)
    if patch is not None and patch[-1] != encoder.patch_size:
        yield "encoder.patch_size", encoder.patch_size, patch[-1]
    places = next((e.shape for n, e in tower.items() if n.endswith("position_embedding.weight")), None)
    if places is not None and places[0] != encoder.patches + encoder.has_cls:
        yield "visual tokens of an image (encoder.image_size)", encoder.patches, places[0] - encoder.has_cls
    layers = {n.split(".layers.")[1].split(".")[0] for n in tower if ".layers." in n}
    if tower and len(layers) != blocks:
        yield "encoder.arch.num_hidden_layers", blocks, len(layers)
    yield from _projector_of(config, key, found, {n: e for n, e in tensors.items() if "mm_projector" in n})


def _projector_of(config: Config, key: str, found: Folder, tensors: Tensors) -> Iterator[Difference]:
    names = projector_tensors(tensors)
    if not names:
        raise UserError(
            f"{key}: {found.path} holds no projector that is known (0.weight and 2.weight, or one weight, perhaps "
            f"behind model.mm_projector.; found {', '.join(sorted(tensors)[:3]) or 'none'}): LLaVA's linear and "
            "mlp2x_gelu can be taken up"
        )
    kind = "mlp2x_gelu" if "linear_2.weight" in names else "linear"
    if kind != config.projector.name:
        yield "projector.name", config.projector.name, kind
    width: Any = chosen_config(config.llm)
    features: Any = chosen_config(config.encoder)
    out, inputs = names["linear_1.weight"].shape
    if inputs != features.hidden_size:
        yield "encoder.arch.hidden_size", features.hidden_size, inputs
    if out != width.hidden_size:
        yield "llm.arch.hidden_size", width.hidden_size, out


def _adapters(config: Config, key: str, found: Folder, tensors: Tensors) -> Iterator[Difference]:
    text: Any = chosen_config(config.llm)
    depth = 1 + max(int(name.split(".")[1]) for name in tensors)
    if depth > text.num_hidden_layers:
        yield "llm.arch.num_hidden_layers", text.num_hidden_layers, f"{depth} or more"
    for name, entry in tensors.items():
        if name.endswith(("q_proj.lora_A", "gate_proj.lora_A", "qkv_proj.lora_A")) and len(entry.shape) == 2:
            if entry.shape[1] != text.hidden_size:
                yield "llm.arch.hidden_size", text.hidden_size, entry.shape[1]
            return


_COMPARED = {LLAVA: _llava, ORIGINAL: _original, PROJECTOR: _projector_of, ADAPTERS: _adapters}


def chosen_config(part: EncoderConfig | LlmConfig) -> PreTrainedConfig:
    """transformers' config of the chosen encoder or LLM: its folder's, where `path` names one, else `arch`'s."""
    folder = Path(part.path).expanduser() if part.path else None
    if folder is not None and (folder / "config.json").is_file():
        config = config_of(folder)
        return getattr(config, "vision_config", config)
    return arch_config("encoder.arch" if isinstance(part, EncoderConfig) else "llm.arch", part.arch)


def _language(llm: LlmConfig, there: Any) -> Iterator[Difference]:
    chosen: Any = chosen_config(llm)
    yield from _differences("llm", chosen, there, TEXT)
    if not chosen.vocab_size <= there.vocab_size <= chosen.vocab_size + GROWN:
        yield "llm.arch.vocab_size", chosen.vocab_size, there.vocab_size


def _differences(part: str, chosen: Any, there: Any, names: tuple[str, ...]) -> Iterator[Difference]:
    for name in names:
        ours, theirs = getattr(chosen, name, None), getattr(there, name, None)
        if ours is not None and ours != theirs:
            yield f"{part}.arch.{name}", ours, theirs


def _features(encoder: EncoderConfig, layer: Any, drops_cls: bool, vision: Any) -> Iterator[Difference]:
    blocks = vision.num_hidden_layers
    if feature_indices(encoder.feature_layer, blocks) != feature_indices(layer, blocks):
        yield "encoder.feature_layer", encoder.feature_layer, layer
    if encoder.has_cls and not drops_cls:
        yield "patches alone are features (vision_feature_select_strategy)", "default", "full"


def _preparation(encoder: EncoderConfig, key: str, folder: Path) -> Iterator[Difference]:
    """Where the folder's own image preparation shifts or scales colours otherwise."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            said = read_config(key, folder / name)
            said = said["image_processor"] if isinstance(said.get("image_processor"), dict) else said
            for what in ("image_mean", "image_std"):
                ours, theirs = getattr(encoder, what), said.get(what)
                if theirs and not _near(ours, theirs):
                    yield f"encoder.{what}", ours, theirs
            return


def _near(ours: list[float], theirs: Any) -> bool:
    numbers = isinstance(theirs, list) and all(isinstance(value, int | float) for value in theirs)
    return numbers and len(ours) == len(theirs) and all(abs(a - b) <= 1e-3 for a, b in zip(ours, theirs, strict=True))
