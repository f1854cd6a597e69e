"""Encoder and LLM as the config describes them: fields that no network can have are refused."""

from __future__ import annotations

import re
from typing import Any

from mmprune_train.config.schema import EncoderConfig, LlmConfig, WheelConfig
from mmprune_train.errors import UserError

SIZES = r"(_size|_dim|_heads|_layers|_channels|^max_position_embeddings)$"
"""Fields of an `arch` that count something of the network."""


def check_encoder(encoder: EncoderConfig) -> None:
    arch = encoder.arch
    check_arch("encoder.arch", arch)
    if arch.get("num_channels", 3) != 3:
        raise UserError(f"encoder.arch.num_channels={arch['num_channels']}: images have 3; choose another encoder=")
    if encoder.text is not None:
        check_arch("encoder.text.arch", {"model_type": "clip_text_model", **encoder.text.arch})
    _wheel("encoder.wheel", encoder.wheel)
    if arch.get("patch_size", encoder.patch_size) != encoder.patch_size:
        raise UserError(
            f"encoder.patch_size={encoder.patch_size} differs from encoder.arch.patch_size={arch['patch_size']}: "
            "a patch size belongs to the weights, so set both to theirs"
        )
    trained = arch.get("image_size", encoder.image_size)
    if arch["model_type"] == "dinov2":  # interpolates its position embeddings
        if encoder.image_size % encoder.patch_size:
            raise UserError(
                f"encoder.image_size={encoder.image_size} is no multiple of encoder.patch_size={encoder.patch_size}: "
                f"use {max(1, round(encoder.image_size / encoder.patch_size)) * encoder.patch_size}"
            )
    elif encoder.image_size != trained:
        raise UserError(
            f"encoder.image_size={encoder.image_size}: {arch['model_type']} has position embeddings for "
            f"{trained} pixels only; set encoder.image_size={trained} (or choose encoder=dinov2_small)"
        )
    layers = arch.get("num_hidden_layers")
    if layers is not None and not -layers - 1 <= encoder.feature_layer <= layers:
        raise UserError(
            f"encoder.feature_layer={encoder.feature_layer}: {encoder.name} has {layers} layers, so hidden states "
            f"{-layers - 1}..{layers}; LLaVA uses -2"
        )
    for key in ("image_mean", "image_std"):
        if len(getattr(encoder, key)) != 3:
            raise UserError(f"encoder.{key} needs three numbers (red, green, blue), got {getattr(encoder, key)}")
    if encoder.text is not None and arch["model_type"] != "clip_vision_model":
        raise UserError(f"encoder.text: a CLIP text tower does not fit a {arch['model_type']}; set encoder.text=null")


def check_llm(llm: LlmConfig) -> None:
    check_arch("llm.arch", llm.arch)
    _wheel("llm.wheel", llm.wheel)


def check_arch(key: str, arch: dict[str, Any]) -> None:
    """Raise UserError for fields of a transformers config that no network can have; which fields there are, and what
    else they may be, only transformers knows (`model/arch.py`)."""
    if not arch.get("model_type") or not isinstance(arch["model_type"], str):
        raise UserError(f"{key}.model_type is not set: name a transformers model, e.g. llama; see conf/{key[:-5]}/")
    for name, value in arch.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if re.search(SIZES, name) and value is not None:
            least = 8 if name == "max_position_embeddings" else 1  # special tokens and a word
            most = 1000 if name.endswith("_layers") else 10**8
            if not whole or not least <= value <= most:
                raise UserError(f"{key}.{name}={value} must be a whole number from {least} to {most:,}")
        elif "dropout" in name and (not (whole or isinstance(value, float)) or not 0 <= value < 1):
            raise UserError(f"{key}.{name}={value} is a probability: a number from 0 to less than 1")
        elif name.endswith("_eps") and (not (whole or isinstance(value, float)) or not 0 <= value <= 1):
            raise UserError(f"{key}.{name}={value} must be a number from 0 to 1")
        elif name.endswith("_token_id"):
            words = arch.get("vocab_size") or 10**8
            for token in (value or [[]]) if isinstance(value, list) else [value]:
                if token is not None and not (type(token) is int and -1 <= token < words):
                    raise UserError(f"{key}.{name}={value} is no token: {key}.vocab_size={words} are from 0")
    rotary = arch.get("rope_parameters")
    theta = (rotary if isinstance(rotary, dict) else arch).get("rope_theta", 1)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta < 1:
        raise UserError(f"{key}: rope_theta={theta} must be a number of at least 1; 10000 is the usual one")
    width, heads = arch.get("hidden_size"), arch.get("num_attention_heads")
    groups = arch.get("num_key_value_heads")
    if width and heads and not arch.get("head_dim") and width % heads:
        raise UserError(f"{key}.hidden_size={width} is no multiple of {key}.num_attention_heads={heads}; correct one")
    if heads and groups and heads % groups:
        raise UserError(
            f"{key}.num_attention_heads={heads} is no multiple of {key}.num_key_value_heads={groups}; correct one"
        )
    if key == "llm.arch" and width and heads and (arch.get("head_dim") or width // heads) % 2:
        raise UserError(
            f"{key}: heads of {arch.get('head_dim') or width // heads} features have no pairs to rotate by position; "
            f"make hidden_size={width} / num_attention_heads={heads} (or head_dim) even"
        )


def _wheel(key: str, wheel: WheelConfig | None) -> None:
    for part in ("package", "version", "file", "sha256"):
        if wheel is not None and not getattr(wheel, part):
            raise UserError(f"{key}.{part} is not set: a wheel needs package, version, file and sha256")
    for part in ("package", "version"):  # pip would take an option, or an address whose build it runs
        if wheel is not None and not re.fullmatch(r"\w[\w.+!-]*", getattr(wheel, part), re.ASCII):
            raise UserError(
                f"{key}.{part}={getattr(wheel, part)}: give the project's name on the package index and its version"
            )
    if wheel is not None and not re.fullmatch("[0-9a-fA-F]{64}", wheel.sha256):
        raise UserError(f"{key}.sha256={wheel.sha256} is no SHA-256: 64 hexadecimal digits")
