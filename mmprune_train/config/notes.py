"""What to tell at the start of settings that are right and do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from mmprune_train.config.compose import config_from_file
from mmprune_train.config.identity import run_of
from mmprune_train.config.pruner import idle_budgets, idle_knee
from mmprune_train.config.schema import Config, EncoderConfig
from mmprune_train.config.typed import group_of


def notes(config: Config, overrides: Sequence[str]) -> list[str]:
    """A line for each group of settings that has no effect.

    Args:
        overrides: the command line's.
    """
    named = set(map(group_of, overrides))
    found = [idle_knee(config.pruner, config.knee)] if "knee" in named else []
    used = config.task in ("train", "plan") or (config.ckpt and named & {"pruner", "knee"})
    if used and (encoder := _encoder_of(config, named)) is not None:
        found.append(idle_budgets(config.pruner, encoder.patches))
    return [note for note in found if note]


def _encoder_of(config: Config, named: set[str]) -> EncoderConfig | None:
    """The encoder that the task will run; None where a model folder has one of its own."""
    if config.task in ("train", "plan") or named & {"encoder", "experiment"}:
        return config.encoder
    run = run_of(config.ckpt)
    return config_from_file(run / "config.yaml").encoder if run and (run / "config.yaml").is_file() else None
