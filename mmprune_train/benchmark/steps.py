"""What one optimizer step costs: seconds by part, memory, operations, for several ways of computing it side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmprune_train.benchmark.baseline import as_transformers, padded_inputs
from mmprune_train.benchmark.counters import flop_counter, peak_memory
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.data.batch import Batch
from mmprune_train.model.execution import Clock
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.packed.patches import Patches

Result = TypeVar("Result")
Cost = TypeVar("Cost", bound=Any)
BASELINE = "hf_padded"
"""Name of the plain Hugging Face model among the ways."""
PARTS = ("vision", "selection", "forward", "backward", "optimizer")
"""What the seconds of a step are told apart into; `forward` is the LLM's, with projector and loss."""

Shares = tuple[float | None, float | None, float | None, float | None]
"""Of the LLM's operations, of its seconds, of the peak memory, of its `causal_flops`; None: not to be had."""


@dataclass
class StepCost:
    """One way of computing a step; times are medians over the repeats."""

    seconds: dict[str, float]
    """By part, see `PARTS`, and their sum as `step`."""
    seconds_all: dict[str, list[float]]
    """The same of every repeat, in order."""
    peak_bytes: int
    """Highest memory of a step above what is there between steps: weights, optimizer states."""
    flops: dict[str, float]
    """By part, counted by PyTorch, and their sum as `step`. A trained tower's backward pass is in `backward`."""
    tokens: dict[str, float] = field(default_factory=dict)
    """Totals of the batch: dense, stage1, stage2, layer_mean, and what was computed beside these as padding."""
    causal_flops: float | None = None
    """Of the parts of `language_seconds`, by `StepFlops`: causal attention is charged the half that kernels compute,
    where PyTorch's counter charges the whole. None: not the packed model."""

    @property
    def language_seconds(self) -> float:
        """Forward and backward, without the vision tower and the choosing of tokens: the median of each round's sum."""
        rounds = zip(self.seconds_all["forward"], self.seconds_all["backward"], strict=True)
        return median(forward + backward for forward, backward in rounds)

    @property
    def language_flops(self) -> float:
        """Of the same parts as `language_seconds`."""
        return self.flops["forward"] + self.flops["backward"]

    @property
    def keep_ratio(self) -> float:
        return self.tokens["layer_mean"] / self.tokens["dense"]

    def beside(self, dense: StepCost | None) -> Shares:
        """Its cost as shares of the dense packed model's."""
        if dense is None:
            return None, None, None, None
        return (
            self.language_flops / dense.language_flops,
            self.language_seconds / dense.language_seconds,
            self.peak_bytes / dense.peak_bytes,
            self.causal_flops and dense.causal_flops and self.causal_flops / dense.causal_flops,
        )


@dataclass
class Way:
    """One way of computing the loss of a batch."""

    loss: Callable[[Clock], Tensor]
    """One forward pass, which the clock times as the model does."""
    context: Callable[[], AbstractContextManager[Any]]
    """Entered around a step."""
    tokens: dict[str, float] = field(default_factory=dict)
    """Filled by `loss`."""
    causal_flops: float | None = None
    """Filled by `loss`; see `StepCost`."""


def pruned(
    model: PackedLlava,
    batch: Batch,
    settings: PrunerConfig,
    read_cache: Callable[[], Patches] | None = None,
) -> Way:
    """The packed model with one pruner.

    Args:
        read_cache: gives the visual tokens that stage 1 keeps of the batch's images; None: the tower runs.
    """

    def loss(clock: Clock) -> Tensor:
        patches = None
        if read_cache is not None:
            with clock.part("vision"):
                patches = read_cache()
        pixels = batch.pixel_values if patches is None else None
        with clock.part("forward"):
            output = model.forward_packed(batch.sequence, pixels, patches=patches)
        counts = output.trace.counts()
        way.tokens = {name: counts[name] for name in ("dense", "stage1", "stage2", "layer_mean")} | {"padding": 0.0}
        if way.causal_flops is None:
            way.causal_flops = StepFlops(model)(output.trace, images=0, supervised=int(output.supervised))
        return output.loss_sum / output.supervised

    way = Way(loss, lambda: model.pruned_by(settings))
    return way


def padded(model: PackedLlava, batch: Batch) -> Way:
    """The Hugging Face model with the same weights and samples."""
    inputs = {name: value.to(model.device) for name, value in padded_inputs(batch).items()}
    tower: Any = model.hf.model.vision_tower

    def loss(clock: Clock) -> Tensor:
        with clock.part("forward"), timed_module(tower, clock, "vision"):
            result: Tensor = model.hf(**inputs, use_cache=False).loss  # as trainers call it
        return result

    dense = float(inputs["attention_mask"].sum())
    every = float(inputs["input_ids"].numel())
    tokens = dict.fromkeys(("dense", "stage1", "stage2", "layer_mean"), every) | {"dense": dense}
    return Way(loss, lambda: as_transformers(model), tokens | {"padding": every - dense})


@contextmanager
def timed_module(module: nn.Module, clock: Clock, part: str) -> Iterator[None]:
    """Book what `module`'s calls take under `part`."""
    running: list[AbstractContextManager[None]] = []

    def enter(*_: Any) -> None:
        running.append(clock.part(part))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step_costs(
    model: PackedLlava,
    ways: Mapping[str, Way],
    repeats: int,
    dtype: torch.dtype,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, StepCost]:
    """Measure every way on the same weights: one step that is not counted, then `repeats` interleaved ones, then one
    for memory and one for operations.

    Args:
        model: frozen as it is trained; a learning rate of zero leaves its weights as they are.
        dtype: bfloat16 computes under autocast.
        progress: wraps the numbers of the rounds.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    device = trained[0].device
    clock = Clock()
    rounds = progress(range(repeats + 1))
    laps = interleaved(ways, rounds, lambda name: one_step(model, ways[name], optimizer, dtype, clock))
    costs = {}
    for name, way in ways.items():
        gc.collect()
        with peak_memory(device) as memory:
            one_step(model, way, optimizer, dtype, clock)
        with flop_counter() as counter, model.executed(attention="sdpa_per_sample"):  # which the counter sees
            flops = one_step(model, way, optimizer, dtype, Clock(counter.get_total_flops))
        seconds = {part: [lap.get(part, 0.0) for lap in laps[name]] for part in PARTS}
        seconds["step"] = [sum(lap.values()) for lap in laps[name]]
        costs[name] = StepCost(
            seconds={part: median(times) for part, times in seconds.items()},
            seconds_all=seconds,
            peak_bytes=memory.bytes,
            flops={part: flops.get(part, 0.0) for part in PARTS} | {"step": sum(flops.values())},
            tokens=way.tokens,
            causal_flops=way.causal_flops,
        )
    return costs


def interleaved(
    names: Iterable[str], rounds: Iterable[int], measure: Callable[[str], Result]
) -> dict[str, list[Result]]:
    """What `measure` finds of every name in each round over all of them; the first is not counted."""
    first, *rest = ({name: measure(name) for name in names} for _ in rounds)
    return {name: [found[name] for found in rest] for name in first}


def medians(rounds: Sequence[Cost]) -> Cost:
    """Of a cost's numbers that are no counts."""
    names = [name for name, value in vars(rounds[-1]).items() if isinstance(value, float)]
    return replace(rounds[-1], **{name: median(getattr(cost, name) for cost in rounds) for name in names})


def one_step(
    model: PackedLlava, way: Way, optimizer: torch.optim.Optimizer, dtype: torch.dtype, clock: Clock
) -> dict[str, float]:
    """Seconds, or what the clock counts, by part. Autocast ends with the loss, as in training: it holds copies of
    trained weights."""
    with model.executed(clock=clock), way.context():
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = way.loss(clock)
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return clock.lap()
