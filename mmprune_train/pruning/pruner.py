"""The pruner: settings in, masks out. It owns no weights, so any model can carry any pruner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.pruning.language_stage import LanguageStage
from mmprune_train.pruning.schedule import BudgetOverride
from mmprune_train.pruning.vision_stage import VisionStage


class Pruner(VisionStage, LanguageStage):
    """Both stages of arXiv 2409.01162's method, with every unpublished detail a setting (see `docs/method.md`).

    Each stage makes the host wait for the device once, to learn what stays; `docs/budgets.md` names the settings that
    do so more often. Scores that cannot be ranked are found then, too: a row of which nothing stays.
    """

    def __init__(self, settings: PrunerConfig) -> None:
        self.settings = settings
        self._override: BudgetOverride | None = None
        self.load_vision_stage()
        self.load_language_stage()

    @contextmanager
    def overriding(self, override: BudgetOverride | None) -> Iterator[None]:
        """Override the budgets of the stages that the schedule applies to, as long as the context lasts."""
        self._override = override
        try:
            yield
        finally:
            self._override = None

    def override_of(self, stage: str) -> BudgetOverride | None:
        """What overrides the budgets of `vision` or `language` now."""
        return self._override if stage in self.settings.schedule.applies_to else None
