"""What would fit where a stage does not: the first of a few changes, in the order in which they cost least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mmprune_train.config.checks import UNQUANTIZED
from mmprune_train.config.schema import Config, PeftConfig

ZERO = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
OFFLOAD = ("deepspeed_zero2_offload", "deepspeed_zero3_offload")
KINDS = ("none", "lora", "qlora")


@dataclass(frozen=True)
class Change:
    """A config with changes to one stage of it, and the overrides that make them."""

    config: Config
    name: str
    overrides: dict[str, str] = field(default_factory=dict)

    def stage(self, key: str, value: Any) -> Change:
        """Another setting of the stage."""
        stage = replace(self.config.stage[self.name], **{key: value})
        config = replace(self.config, stage={**self.config.stage, self.name: stage})
        said = str(value).lower() if isinstance(value, bool) else str(value)
        return replace(self, config=config, overrides={**self.overrides, f"stage.{self.name}.{key}": said})

    def adapters(self, kind: str) -> Change:
        """Adapters of this kind: the size of those that are there, else the default."""
        there = self.config.peft if self.config.peft.name != "none" else PeftConfig()
        config = replace(self.config, peft=replace(there, name=kind))
        changed = replace(self, config=config, overrides={**self.overrides, "peft": kind})
        return changed if config.stage[self.name].use_peft else changed.stage("use_peft", True)


def first_that_fits(
    config: Config, name: str, memory: Callable[[Config], float], limit: float, gpu: bool = True
) -> list[str] | None:
    """Overrides with which stage `name` needs at most `limit` bytes; None: none of those that are tried.

    Args:
        memory: bytes that a stage of this config needs on a device.
        gpu: the device is one, so 4-bit weights and the host's memory are there to turn to.
    """
    for change in _candidates(Change(config, name), gpu):
        if memory(change.config) <= limit:
            return [f"{key}={value}" for key, value in change.overrides.items()]
    return None


def _candidates(change: Change, gpu: bool) -> Iterator[Change]:
    """Gradient checkpointing; then also smaller batches; the next ZeRO stages, alone and with these; LoRA; QLoRA; all
    weights again, with what can go to the host's memory there, which costs the most time."""
    stage = change.config.stage[change.name]
    if not stage.gradient_checkpointing:
        change = change.stage("gradient_checkpointing", True)
        yield change
    yield from _smaller(change)
    trainer = change.config.trainer
    several = trainer.devices * trainer.num_nodes > 1
    strategy = stage.strategy or change.config.strategy.name
    if several and strategy not in OFFLOAD:
        following = ZERO[ZERO.index(strategy) + 1 :] if strategy in ZERO else ZERO
        for zero in following:
            change = change.stage("strategy", zero)
            yield change
        if following:
            yield from _smaller(change)
    if stage.train_llm:
        adapted = change.config.peft.name if stage.use_peft else "none"
        for kind in KINDS[KINDS.index(adapted) + 1 :] if adapted in KINDS else ("qlora",):
            if kind == "qlora" and not gpu:
                continue
            fewer = change.adapters(kind)
            if kind == "qlora" and (fewer.config.stage[change.name].strategy or strategy) in UNQUANTIZED:
                fewer = fewer.stage("strategy", "deepspeed_zero2" if several else "single")
            yield fewer
            yield from _smaller(fewer)
    if not gpu:
        return
    for offload in OFFLOAD[OFFLOAD.index(strategy) + 1 :] if strategy in OFFLOAD else OFFLOAD:
        change = change.stage("strategy", offload)
        yield change
        yield from _smaller(change)


def _smaller(change: Change) -> Iterator[Change]:
    """Half the samples, or tokens, a pass and again, for the same global batch."""
    stage = change.config.stage[change.name]
    key = "batch_size" if stage.token_budget is None else "token_budget"
    size = getattr(stage, key)
    while size % 2 == 0 and (key == "batch_size" or size > stage.max_length):
        size //= 2
        yield change.stage(key, size)
