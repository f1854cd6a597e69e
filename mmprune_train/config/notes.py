"""What to tell at the start of settings that are right and do nothing."""

from __future__ import annotations

from mmprune_train.config.command import Command
from mmprune_train.config.compose import config_from_file
from mmprune_train.config.identity import run_of
from mmprune_train.config.pruner import idle_budgets, idle_knee
from mmprune_train.config.schema import Config, EncoderConfig


def notes(config: Config, command: Command) -> list[str]:
    """A line for each group of settings that has no effect."""
    found = [idle_knee(config.pruner, config.knee)] if command.names("knee") else []
    used = config.task in ("train", "plan") or (config.ckpt and command.names("pruner", "knee"))
    if used and (encoder := _encoder_of(config, command)) is not None:
        found.append(idle_budgets(config.pruner, encoder.patches))
    return [note for note in found if note]


def _encoder_of(config: Config, command: Command) -> EncoderConfig | None:
    """The encoder that the task will run; None where a model folder has one of its own."""
    if config.task in ("train", "plan") or command.names("encoder"):
        return config.encoder
    run = run_of(config.ckpt)
    return config_from_file(run / "config.yaml").encoder if run and (run / "config.yaml").is_file() else None
