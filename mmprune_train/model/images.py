"""The image side of the network: from pixels to the visual tokens kept by vision-side pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mmprune_train.errors import UserError
from mmprune_train.model.content_words import Spell, content_words
from mmprune_train.model.execution import Execution
from mmprune_train.model.language import looking
from mmprune_train.model.question import ImageQuestions, QuestionEncoder, TextFeatures, show
from mmprune_train.model.rows import by_rows
from mmprune_train.model.vision import encode, features_of
from mmprune_train.packed.host import fetch, upload
from mmprune_train.packed.padding import pad
from mmprune_train.packed.patches import Patches
from mmprune_train.pruning import Pruner
from mmprune_train.pruning.budgets import poison
from mmprune_train.pruning.views import VisionView


@contextmanager
def swapped(owner: object, **values: Any) -> Iterator[None]:
    """An object with other values of some attributes, as long as the context lasts."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


class ImageSide:
    """What `PackedLlava` does with images, before its LLM; it owns the members below."""

    hf: LlavaForConditionalGeneration
    config: LlavaConfig
    pruner: Pruner
    question: QuestionEncoder | None
    spell: Spell | None
    scorer: nn.Module | None
    execution: Execution
    training: bool
    device: torch.device

    def without_tower(self) -> AbstractContextManager[None]:
        """The same network without its vision tower, as long as the context lasts: the tower stays where it is while
        the rest goes to a device, and nothing can run it."""
        return swapped(self.hf.model, vision_tower=nn.Module())

    def select_patches(self, pixel_values: Tensor, asked: TextFeatures | None = None, least_passes: int = 0) -> Patches:
        """Stage 1 of images [I, 3, H, W]: a row for each image, or for each that `asked` has.

        Args:
            least_passes: passes that the tower makes in training at least, if need be of blank images: where every rank
                must run the same modules as often (ZeRO-3).
        """
        tower: Any = self.hf.model.vision_tower
        size = self.execution.vision_chunk
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
        parts = []
        for number, chunk in enumerate(pixel_values.split(size)):
            with self.execution.timed("vision"), torch.set_grad_enabled(trained):
                states, view = self.encode_images(chunk)
            with self.execution.timed("selection"):
                parts.append(self.cut_images(states, view, asked, first=number * size))
        patches = Patches.cat(parts)
        if self.training:
            nothing = None if asked is None else asked.nothing()
            for _ in range(len(parts), least_passes):
                with torch.set_grad_enabled(trained):
                    states, view = self.encode_images(self._blank())
                idle = self.cut_images(states, view, nothing)
                patches = replace(patches, chosen=patches.chosen + 0.0 * idle.chosen.sum())
                if patches.gates is not None and idle.gates is not None:
                    patches = replace(patches, gates=patches.gates + 0.0 * idle.gates.sum())
        return patches

    def _blank(self) -> Tensor:
        size = self.config.vision_config.image_size
        return torch.zeros((1, 3, size, size), device=self.device)

    def features_of(self, pixel_values: Tensor) -> int:
        """N, what the LLM gets of each of the images [I, 3, H, W]."""
        return features_of(self.config, *pixel_values.shape[-2:])

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, VisionView]:
        """Features [I, N, D] of images [I, 3, H, W] for the projector, and what stage 1 looks at."""
        tower: Any = self.hf.model.vision_tower
        features, view = encode(
            tower,
            pixel_values.to(tower.dtype),
            self.config.vision_feature_layer,
            drop_cls=self.config.vision_feature_select_strategy == "default",
            layers=self.pruner.blocks,
        )
        return features, replace(view, weights=self.scorer)

    def cut_images(
        self,
        states: Tensor,
        view: VisionView,
        asked: TextFeatures | None = None,
        first: int = 0,
        scores: Tensor | None = None,
    ) -> Patches:
        """Stage 1 of encoded images: a row for each image, or for each that `asked` has. Here the host waits for it.

        Args:
            states: features [I, N, D] for the projector.
            view: what stage 1 looks at.
            asked: the questions, where the pruner reads them; None: nothing is asked.
            first: number of the first of these images among those of `asked`.
            scores: [I, N] of an earlier call, which need not be computed again.
        """
        if states.shape[1] != view.patches.shape[1]:  # no patch grid to prune on
            if self.pruner.settings.vision.enabled:
                full = states.shape[1] > view.patches.shape[1]
                raise UserError(
                    f"vision_feature_select_strategy={self.config.vision_feature_select_strategy!r} "
                    f"{'feeds the CLS token to the LLM' if full else 'leaves out a patch of an encoder without CLS'}, "
                    f"which stage 1 cannot prune; use {'default' if full else 'full'!r}, or pruner=language_only"
                )
            view.patches = states
        projected, features = partial(self._project_to_look, states), states
        if self.pruner.merges_projected:
            states = self.project(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        if self.pruner.reads_text and view.question is None and view.words is None:
            if asked is None:
                asked, first = self.ask(ImageQuestions.unasked(len(states))), 0
            view, rows = show(view, asked, first, self.question)
            projected = partial(self._project_to_look, features, rows)
            states = states[rows]
        if not self.pruner.settings.vision.enabled:
            return Patches.whole(states)
        scores = self.pruner.score_patches(view) if scores is None else scores
        weighed, scores = scores, self.pruner.tried(scores, self.training)
        kept, _ = self.pruner.keep_patches(view, projected, scores)
        features, places = self.pruner.merge_patches(states, kept, scores, view)
        features, cls = self.pruner.place_cls(features, places, view)
        order = fetch(self.pruner.entry_order(kept, places, scores, cls))
        lost = order[:, 0] < 0
        if bool(lost.any()):
            self.pruner.refuse_patches(scores, lost, self.training)
            order = torch.where(lost[:, None], torch.arange(order.shape[1]), order)
            features = features * upload(poison(lost), features.device)[:, None, None].to(features.dtype)
        patches = Patches.cut(features, order, scores, self.pruner.gates(weighed, scores, kept))
        return replace(patches, excess=self.pruner.excess(weighed))

    def ask(self, pairs: ImageQuestions) -> TextFeatures:
        """What stage 1 reads of the questions; the same modules run whatever they are, as under ZeRO-3 every rank must
        run them."""
        asked = TextFeatures.unread(pairs, self.device) if self.question is None else self.question.ask(pairs)
        return replace(asked, words=self._embed_words(pairs.question)) if self.pruner.reads_words else asked

    @torch.no_grad()
    def _embed_words(self, questions: list[str]) -> Tensor:
        """[P, W, D] the LLM's embeddings of each question's content words, zeros behind the last."""
        assert self.spell is not None, "words without what spells them"
        ids = [self.spell(content_words(question)) for question in questions]
        row = torch.repeat_interleave(torch.tensor([len(one) for one in ids]))
        flat = upload(torch.tensor(list(chain.from_iterable(ids)), dtype=torch.long), self.device)
        return pad(self.hf.model.language_model.embed_tokens(flat), row, len(ids))[0]

    def project(self, features: Tensor) -> Tensor:
        """[R, D] features [R, Dv] after the projector."""
        return by_rows(self.hf.model.multi_modal_projector, features)

    def visual_tokens(self, patches: Patches) -> Tensor:
        """[K, D] what enters the LLM of the patches that stay."""
        return patches.gated(patches.chosen if self.pruner.merges_projected else self.project(patches.chosen))

    @torch.no_grad()
    def _project_to_look(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """[I, N, D] features after the projector, for stage 1 to look at; of the images `rows`, where given."""
        with looking(features.device):
            projected = self.hf.model.multi_modal_projector(features)
        return projected if rows is None else projected[rows]

    def kept_features(self, pixel_values: Tensor) -> Tensor:
        """[K, Dv] features of images [I, 3, H, W] that enter the projector: kept by vision-side pruning, or all."""
        pixel_values = pixel_values.to(self.device)
        if self.pruner.merges_projected:
            return self.encode_images(pixel_values)[0].flatten(0, 1)
        return self.select_patches(pixel_values).chosen

    def absent_image(self, least_passes: int = 0) -> Tensor | None:
        """In training, a text-only batch runs the vision path on a blank image with zero weight, so that every rank
        runs the same modules each step whatever its samples (ZeRO-3 and DDP would hang otherwise)."""
        if not self.training:
            return None
        blank = self._blank()  # ZeRO-3 gathers a weight that is named
        asked = self.ask(ImageQuestions.unasked(1)) if self.pruner.reads_text else None  # first, as with images
        return self.visual_tokens(self.select_patches(blank, asked, least_passes))
