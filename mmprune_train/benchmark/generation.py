"""What answering costs: time to the first token, tokens a second, and the cache's memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria, StoppingCriteriaList

from mmprune_train.benchmark.baseline import as_transformers
from mmprune_train.benchmark.steps import BASELINE, interleaved, medians
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.model.llava import PackedLlava


@dataclass
class GenerationCost:
    """Greedy answers of a fixed length to one batch of prompts; times are medians over the repeats."""

    first_token_seconds: float
    """From the call to the first new token: vision, pruning, prompt."""
    tokens_per_second: float
    """New tokens of all samples after the first ones, over the time they took."""
    cache_bytes: int
    """Keys and values at the end."""


class _Stamps(StoppingCriteria):
    """Notes when each token was ready; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generation_costs(
    model: PackedLlava,
    inputs: Mapping[str, Tensor],
    pruners: Mapping[str, PrunerConfig],
    new_tokens: int,
    repeats: int,
    dtype: torch.dtype,
    baseline: bool = True,
) -> dict[str, GenerationCost]:
    """Time several pruners, and the padded Hugging Face model, on the same prompts and weights, interleaved, after one
    round that is not counted.

    Args:
        inputs: the llava-hf processor's, padded on the left.
        new_tokens: tokens that every sample generates, at least 2.
    """

    def measure(name: str) -> GenerationCost:
        with as_transformers(model) if name == BASELINE else model.pruned_by(pruners[name]):
            return _generate(model.hf if name == BASELINE else model, inputs, new_tokens, dtype)

    found = interleaved([*([BASELINE] if baseline else []), *pruners], range(repeats + 1), measure)
    return {name: medians(rounds) for name, rounds in found.items()}


@torch.inference_mode()
def _generate(model: Any, inputs: Mapping[str, Tensor], new_tokens: int, dtype: torch.dtype) -> GenerationCost:
    device = inputs["input_ids"].device
    stamps = _Stamps(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        out = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
    first, last = stamps.times[0], stamps.times[-1]
    rate = len(inputs["input_ids"]) * (len(stamps.times) - 1) / (last - first)
    return GenerationCost(first - began, rate, cache_bytes(out.cache))


def cache_bytes(cache: Cache) -> int:
    """Memory of a generation cache's keys and values."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
