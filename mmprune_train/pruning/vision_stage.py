"""Stage 1: which patches of an image stay, after the vision encoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.pruner_vision import merges_projected, projects, reads_tower, reads_words
from mmprune_train.errors import UserError
from mmprune_train.packed.host import fetch
from mmprune_train.pruning.budgets import Budget, refuse_unsound, sound_rows, whole_lengths
from mmprune_train.pruning.gates import gates_among_kept, gates_of_each, share_above_zero
from mmprune_train.pruning.parts import Part, load_part
from mmprune_train.pruning.schedule import BudgetOverride
from mmprune_train.pruning.selections import top_mask
from mmprune_train.pruning.views import VisionView, full_precision, given


class VisionStage:
    """Stage 1 of a `Pruner`."""

    settings: PrunerConfig
    override_of: Callable[[str], BudgetOverride | None]

    def load_vision_stage(self) -> None:
        """Find its components."""
        key, stage = "pruner.vision", self.settings.vision
        self._merge = None
        self.vision_reads: set[str] = set()
        """What its scores read."""
        self.asked_until = stage.question_ends
        """Texts of which the first one ends the question, as far as scores read it."""
        self.vision_passes: list[tuple[int | float | None, set[str]]] = []
        """For each pass over the patches the encoder's block that it looks at, as `pruner.vision.layer` names it, and
        what its score reads."""
        self.projects = projects(stage)
        """Whether its selection looks at what the projector makes of all patches."""
        self.reads_tower, self.reads_words = reads_tower(stage), reads_words(stage)
        """Whether it reads the question by CLIP's text tower, and word by word."""
        self.merges_projected = merges_projected(stage)
        """Whether what it merges are the patches after the projector."""
        if not stage.enabled:
            return
        self._vision_score = load_part("vision_score", stage.score, f"{key}.score", stage.score_args)
        self.vision_passes.append((stage.layer, set(self._vision_score.component.reads)))
        self._vision_budget = Budget(stage.knee, f"{key}.knee")
        self._select = load_part("selection", stage.selection, f"{key}.selection", stage.selection_args)
        if stage.recover.enabled:
            recover = stage.recover
            self._recover_score = load_part("vision_score", recover.score, f"{key}.recover.score", recover.score_args)
            second = stage.layer if recover.layer is None else recover.layer
            self.vision_passes.append((second, set(self._recover_score.component.reads)))
            self._recover_budget = Budget(recover.knee, f"{key}.recover.knee")
        self.vision_reads.update(*(reads for _, reads in self.vision_passes))
        if stage.merge != "none":
            self._merge = load_part("merge", stage.merge, f"{key}.merge", stage.merge_args)

    @property
    def blocks(self) -> list[int | float | None]:
        """The encoder's blocks that can be looked at, as in `pruner.vision.layer`: the first pass's comes first."""
        return [layer for layer, _ in self.vision_passes] or [self.settings.vision.layer]

    @property
    def merges(self) -> bool:
        """Whether stage 1 merges dropped patches."""
        return self._merge is not None

    @property
    def reads_text(self) -> bool:
        """Whether stage 1 reads the question, so that an image is cut anew for each."""
        return self.reads_tower or self.reads_words

    @property
    def weighted(self) -> Part | None:
        """The score that has weights of its own; None: there is none."""
        scored = self.settings.vision.enabled and self._vision_score.component.weights
        return self._vision_score if scored else None

    def score_patches(self, view: VisionView) -> Float[Tensor, "I N"]:
        """[I, N] stage-1 scores; with a gradient where they have weights that are trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weighted is not None):
            return self._vision_score(view)

    @torch.no_grad()
    def tried(self, scores: Float[Tensor, "I N"], training: bool) -> Float[Tensor, "I N"]:
        """The scores by which patches are chosen: with logistic noise where they are being trained."""
        if not (training and scores.requires_grad and self.settings.vision.noise):
            return scores.detach()
        chance = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
        return scores.detach() + self.settings.vision.noise * chance.logit()

    def gates(
        self, scores: Float[Tensor, "I N"], tried: Float[Tensor, "I N"], kept: Bool[Tensor, "I N"]
    ) -> Float[Tensor, "I N"] | None:
        """What lets a gradient through to the scores of kept patches; None: they have none."""
        if not scores.requires_grad:
            return None
        rule, scale = self._vision_budget.rule(self.override_of("vision")), self.settings.vision.noise or 1.0
        if rule is not None and rule.positive:
            return gates_of_each(scores, kept, scale)
        return gates_among_kept(scores, tried, kept, scale)

    def excess(self, scores: Float[Tensor, "I N"]) -> Float[Tensor, " I"] | None:
        """[I] the share of each image's patches that the scores keep by themselves, without noise, beyond
        `pruner.vision.target`; None: there is none, or nothing to train."""
        if self.settings.vision.target is None or not scores.requires_grad:
            return None
        return share_above_zero(scores, self.settings.vision.noise or 1.0) - self.settings.vision.target

    def penalty(self, excess: Float[Tensor, " I"] | None) -> Float[Tensor, ""] | None:
        """The square of the mean excess, weighted: what is added to the mean loss."""
        return None if excess is None else self.settings.vision.target_weight * excess.mean().square()

    @torch.no_grad()
    def keep_patches(
        self,
        view: VisionView,
        projected: Callable[[], Tensor] | None = None,
        scores: Float[Tensor, "I N"] | None = None,
    ) -> tuple[Bool[Tensor, "I N"], Float[Tensor, "I N"] | None]:
        """Stage 1, score -> budget -> selection, and perhaps a second pass: bool [I, N] of kept patches, and the first
        pass's scores [I, N] (None where stage 1 is off).

        Args:
            projected: what the projector makes of the patches [I, N, D], for `space=projected`.
            scores: those of an earlier call, which need not be computed again.
        """
        images, patches = view.patches.shape[:2]
        if not self.settings.vision.enabled:
            return torch.ones((images, patches), dtype=torch.bool, device=view.patches.device), None
        scores = self.score_patches(view) if scores is None else scores
        budget, override = self._vision_budget, self.override_of("vision")
        whole = whole_lengths(scores)
        counts = budget.counts(scores, whole, lambda: view.patches, override)
        looked = projected() if self.projects and projected is not None else view.patches
        seen = looked if self.settings.vision.space == "projected" else view.patches
        takes = self._select.component.takes
        more = {name: part for name, part in (("projected", looked), ("words", view.words)) if name in takes}
        rule = budget.rule(override)
        if "known" in takes and (rule is None or rule.fixed):  # whatever the scores
            on_host = torch.zeros(images, patches)
            more["known"] = budget.counts(on_host, whole_lengths(on_host), override=override)
        with full_precision(scores):
            kept = self._select(scores, counts, seen, **more)
        kept = kept & sound_rows(scores, whole, rule)[:, None]
        drawn = override is not None and override.ratio is not None  # that ratio is the whole stage's
        recovers = self.settings.vision.recover.enabled and not drawn
        return (self._recover(view, kept) if recovers else kept), scores

    def refuse_patches(self, scores: Float[Tensor, "I N"], lost: Bool[Tensor, " I"], training: bool) -> None:
        """Raise UserError: of some images nothing was kept.

        Args:
            scores: of the first pass.
            lost: those images, on the host.
            training: let scores pass of which no row is finite: what diverges while it trains is not the user's input.
                The caller keeps all of such an image, as NaN (`poison`).
        """
        whole = whole_lengths(scores)
        if training and not bool(fetch(sound_rows(scores, whole))[lost].any()):
            return
        rule = self._vision_budget.rule(self.override_of("vision"))
        refuse_unsound(scores, whole, rule, f"pruner.vision.score={self.settings.vision.score}: ")
        raise UserError(
            f"pruner.vision.recover.score={self.settings.vision.recover.score} gave NaN, infinite, or negative values "
            "that its budget cannot share out; check the model's precision or the score"
        )

    def _recover(self, view: VisionView, kept: Bool[Tensor, "I N"]) -> Bool[Tensor, "I N"]:
        """The second pass: dropped patches come back by its own score and budget, none for want of a question."""
        budget = self._recover_budget
        scores = self._recover_score(self._second_look(view))
        left = (~kept).sum(1)
        if self.settings.vision.recover.counted == "all":
            curve = torch.where(kept, scores.amin(1, keepdim=True), scores)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Duplicate values")  # scikit-learn, of the kept ones
                counts = budget.counts(curve, whole_lengths(curve), lambda: view.patches) * left // kept.shape[1]
        else:
            order = kept.int().sort(dim=1, stable=True).indices  # dropped patches first
            counts = budget.counts(
                scores.gather(1, order),
                left.clamp(min=1),
                lambda: view.patches.gather(1, order[..., None].expand_as(view.patches)),
            ).minimum(left)
        if "question" in self._recover_score.component.reads and view.asked is not None:
            counts = torch.where(view.asked, counts, 0)
        sound = sound_rows(scores, whole_lengths(scores), budget.rule())[:, None] & kept.any(1, keepdim=True)
        return (kept | top_mask(scores.masked_fill(kept, -torch.inf), counts)) & sound

    def _second_look(self, view: VisionView) -> VisionView:
        """What the second pass looks at."""
        layer = self.settings.vision.recover.layer
        return view if layer is None else given(view.block)(layer)

    def merge_patches(
        self,
        features: Float[Tensor, "I N D"],
        kept: Bool[Tensor, "I N"],
        scores: Float[Tensor, "I N"] | None,
        view: VisionView,
    ) -> tuple[Float[Tensor, "I N D"], Bool[Tensor, "I N"]]:
        """The last part of stage 1: features with what dropped patches leave in them, and the mask with the places of
        made tokens. Gradients flow through the features."""
        if self._merge is None or scores is None:
            return features, kept
        more: dict[str, Any] = {"grid": view.grid} if "grid" in self._merge.component.takes else {}
        textual = self.settings.vision.recover.enabled and "question" in self._recover_score.component.reads
        if textual and "text" in self._merge.component.takes:
            more["text"] = self._recover_score(self._second_look(view))
        if "heads" in self._merge.component.takes:
            more["heads"] = view.heads
        with full_precision(features):
            return self._merge(features, kept, scores, view.patch_keys(), **more)

    def place_cls(
        self, features: Float[Tensor, "I N D"], taken: Bool[Tensor, "I N"], view: VisionView
    ) -> tuple[Float[Tensor, "I N D"], Bool[Tensor, "I N"]]:
        """Features with the CLS token in the place of each image's first patch that is not `taken`, and that place;
        none where all are, or where CLS does not enter the LLM."""
        free = ~taken & self.settings.vision.keep_cls
        here = free & (free.cumsum(1) == 1)
        if not self.settings.vision.keep_cls:
            return features, here
        if view.cls_feature is None:
            raise UserError(
                f"pruner.vision.keep_cls=true needs a CLS token, which {view.encoder} does not have; set "
                "pruner.vision.keep_cls=false"
            )
        return torch.where(here[..., None], view.cls_feature[:, None].to(features.dtype), features), here

    @torch.no_grad()
    def entry_order(
        self,
        kept: Bool[Tensor, "I N"],
        merged: Bool[Tensor, "I N"],
        scores: Float[Tensor, "I N"] | None,
        cls: Bool[Tensor, "I N"],
    ) -> Int64[Tensor, "I N"]:
        """[I, N] an image's patches in the order in which they enter the LLM, and -1 behind the last. Nothing but -1:
        its scores cannot be ranked.

        Args:
            kept: before merging.
            merged: with the made tokens, which `order=raster` alone leaves in their places.
            cls: the place of the CLS token, which comes first.
        """
        how, made = self.settings.vision.order, merged & ~kept
        worth = torch.zeros(kept.shape, device=kept.device)
        if scores is not None and how == "rank":
            worth = scores
        if scores is not None and how == "made_ranked":
            worth = torch.where(made, scores, torch.finfo(scores.dtype).max)
        elif how != "raster":
            worth = worth.masked_fill(made, -torch.inf)
        order = worth.masked_fill(cls, torch.inf).sort(dim=1, descending=True, stable=True).indices
        merged = (merged | cls) & kept.any(1, keepdim=True)
        outside = (~merged).gather(1, order).int()
        order = order.gather(1, outside.sort(dim=1, stable=True).indices)
        place = torch.arange(kept.shape[1], device=kept.device)
        return order.masked_fill(place >= merged.sum(1, keepdim=True), -1)
