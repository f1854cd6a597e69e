"""What to tell at the start of settings that are right and do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from mmprune_train.config.compose import config_from_file
from mmprune_train.config.identity import run_of
from mmprune_train.config.knee import keeps_whole, own_budgets, per_layer
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
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


def idle_knee(pruner: PrunerConfig, knee: KneeConfig) -> str | None:
    """What to tell who chooses a `knee` that no budget of the pruner follows; None: one does, or there is no budget."""
    stages = [(key, held) for key, held in own_budgets(pruner) if ".recover." not in key]
    if not stages or any(held == knee for _, held in stages):
        return None
    keys = " or ".join(f"{key}.method" for key, _ in stages)
    return f"knee={knee.method} moves nothing: pruner={pruner.name} sets its own budgets; {keys} does"


def idle_budgets(pruner: PrunerConfig, patches: int) -> str | None:
    """What to tell of budgets that drop nothing of an image, in one line; None: all drop something, or may.

    Args:
        patches: of an image of the encoder.
    """
    vision, language, schedule = pruner.vision, pruner.language, pruner.schedule
    whole = []
    drawn = schedule.applies_to if schedule.name == "random" else []
    if vision.enabled and "vision" not in drawn:
        whole += keeps_whole("pruner.vision.knee", vision.knee, patches)
        if vision.recover.enabled and not whole:
            whole += keeps_whole("pruner.vision.recover.knee", vision.recover.knee, patches)
    if language.enabled and "language" not in drawn:
        key = "pruner.language"
        if language.min_per_image >= patches:
            whole.append(f"{key}.min_per_image={language.min_per_image}")
        elif language.per_layer_budgets is None:
            whole += keeps_whole(f"{key}.knee", language.knee, patches)
        elif all(keeps_whole("", knee, patches) for knee in per_layer(language.knee, language.per_layer_budgets)):
            whole.append(f"{key}.per_layer_budgets={language.per_layer_budgets}")
    if not whole:
        return None
    return f"{' and '.join(whole)}: nothing is dropped of an image, which has {patches} patches on this encoder"
