"""What would fit where a stage does not: the first of a few changes, in the order in which they cost least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mmprune_train.config.schema import Config, PeftConfig

ZERO = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")


def first_that_fits(config: Config, name: str, memory: Callable[[Config], float], limit: float) -> list[str] | None:
    """Overrides with which stage `name` needs at most `limit` bytes; None: none of those that are tried.

    Args:
        memory: bytes that a stage of this config needs on a device.
    """
    for changed, overrides in _candidates(config, name):
        if memory(changed) <= limit:
            return overrides
    return None


def _candidates(config: Config, name: str) -> Iterator[tuple[Config, list[str]]]:
    """Gradient checkpointing; then also smaller batches; the next ZeRO stages, alone and with these; LoRA."""
    stage = config.stage[name]
    said: list[str] = []
    if not stage.gradient_checkpointing:
        config = _with_stage(config, name, gradient_checkpointing=True)
        said = [f"stage.{name}.gradient_checkpointing=true"]
        yield config, said
    yield from _smaller(config, name, said)
    world = config.trainer.devices * config.trainer.num_nodes
    strategy = stage.strategy or config.strategy.name
    if world > 1:
        following = ZERO[ZERO.index(strategy) + 1 :] if strategy in ZERO else ZERO
        for zero in following:
            config = _with_stage(config, name, strategy=zero)
            yield config, [*said, f"stage.{name}.strategy={zero}"]
        if following:
            said = [*said, f"stage.{name}.strategy={following[-1]}"]
            yield from _smaller(config, name, said)
    if stage.train_llm and not (stage.use_peft and config.peft.name != "none"):
        config = _with_stage(replace(config, peft=PeftConfig(name="lora")), name, use_peft=True)
        said = [*said, "peft=lora", *([] if stage.use_peft else [f"stage.{name}.use_peft=true"])]
        yield config, said
        yield from _smaller(config, name, said)


def _smaller(config: Config, name: str, said: list[str]) -> Iterator[tuple[Config, list[str]]]:
    """Half the samples, or tokens, a pass and again, for the same global batch."""
    stage = config.stage[name]
    key = "batch_size" if stage.token_budget is None else "token_budget"
    size = getattr(stage, key)
    while size % 2 == 0 and (key == "batch_size" or size > stage.max_length):
        size //= 2
        yield _with_stage(config, name, **{key: size}), [*said, f"stage.{name}.{key}={size}"]


def _with_stage(config: Config, name: str, **changes: Any) -> Config:
    stage = replace(config.stage[name], **changes)
    return replace(config, stage={**config.stage, name: stage})
