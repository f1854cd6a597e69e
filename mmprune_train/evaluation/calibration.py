"""What calibration measures: stage-1 scores of a sample of images, and token counts of real samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmprune_train.config.knee import with_value
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.data.batch import Batch, collate, without_pixels
from mmprune_train.data.encode import encode
from mmprune_train.data.images import ImageReader
from mmprune_train.data.records import Record
from mmprune_train.data.templates import Template
from mmprune_train.evaluation.generate import batches
from mmprune_train.model.llava import PackedLlava
from mmprune_train.packed.patches import Patches
from mmprune_train.progress import progress
from mmprune_train.pruning import Pruner
from mmprune_train.pruning.calibration import ScoredImages, Searched, Solution, Value, searched, solve
from mmprune_train.pruning.distribution_budgets import effective_rank_of
from mmprune_train.pruning.views import VisionView, given

Encoder = Callable[[Tensor], tuple[Tensor, VisionView]]
"""Pixels [I, 3, H, W] -> features [I, N, D] and what stage 1 looks at."""


def draw_records(records: Sequence[Record], images: int, seed: int) -> list[Record]:
    """Records in an order that the seed decides, until they show that many images or there are no more; text-only ones
    among them are drawn, too."""
    order = list(records)
    random.Random(seed).shuffle(order)
    seen: set[Path] = set()
    drawn = []
    for record in order:
        if len(seen) >= images:
            break
        drawn.append(record)
        seen |= set(record.images)
    return drawn


@dataclass
class EncodedImages:
    """A sample of images after the encoder, in main memory."""

    names: list[str]
    patches: int
    """N, of one image."""
    scores: Tensor | None
    """[I, N]; None where stage 1 is off."""
    feature_rank: Tensor | None
    """[I] effective ranks, where they were asked for."""
    features: Tensor | None
    """[I, N, D] for the projector; this and what follows where passes through the LLM were asked for."""
    looked_at: Tensor | None
    """[I, N, D'] states of the patches that stage 1 looks at."""
    keys: Tensor | None
    """[I, N, D'] keys, for merging."""
    cls_feature: Tensor | None
    """[I, D] of CLS for the projector, where it enters the LLM."""
    grid: tuple[int, int]
    heads: int

    def view(self, row: int, device: torch.device) -> VisionView:
        """Image `row` as stage 1 sees it, except for its score."""
        one = slice(row, row + 1)
        return VisionView(
            given(self.looked_at)[one].to(device),
            self.grid,
            lambda: given(self.keys)[one].to(device),
            cls_feature=None if self.cls_feature is None else self.cls_feature[one].to(device),
            heads=self.heads,
        )


@torch.inference_mode()
def encode_images(
    encoder: Encoder,
    pruner: Pruner,
    images: dict[Path, str],
    reader: ImageReader,
    chunk: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: bool,
    passes: bool,
) -> EncodedImages:
    """Read and encode each image once.

    Args:
        images: path -> who asks for it, for errors.
        chunk: images per forward pass.
        dtype: bfloat16 computes under autocast.
        ranks: also the effective ranks.
        passes: also keep what passes through the LLM need.
    """
    names = ("scores", "feature_rank", "features", "looked_at", "keys", "cls_feature")
    held: dict[str, list[Tensor]] = {name: [] for name in names}
    grid, size, heads = (0, 0), 0, 1
    for part in progress(list(batches(list(images.items()), chunk)), "encode"):
        pixels = torch.stack([reader(path, where) for path, where in part]).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            states, view = encoder(pixels)
            if pruner.settings.vision.enabled:
                held["scores"].append(pruner.score_patches(view).cpu())
            if pruner.merges and passes:
                held["keys"].append(view.patch_keys().cpu())
            if pruner.settings.vision.keep_cls and passes:
                held["cls_feature"].append(given(view.cls_feature).cpu())
        grid, size, heads = view.grid, states.shape[1], view.heads
        if ranks:
            held["feature_rank"].append(effective_rank_of(view.patches.double()).cpu())
        if passes:
            same = states.shape == view.patches.shape and torch.equal(states, view.patches)
            held["features"].append(states.cpu())
            held["looked_at"].append(held["features"][-1] if same else view.patches.cpu())
    joined = {name: torch.cat(parts) if parts else None for name, parts in held.items()}
    return EncodedImages([str(path) for path in images], size, grid=grid, heads=heads, **joined)


def pack(
    records: Sequence[Record], template: Template, tokenizer: Any, image_tokens: int, max_length: int, size: int
) -> list[Batch]:
    """Batches of samples as training packs them, without pixels: their images are encoded already."""
    packed = []
    for part in batches(records, size):
        examples = [encode(record, template, tokenizer, image_tokens, max_length) for record in part]
        packed.append(collate([without_pixels(e, record.images) for e, record in zip(examples, part, strict=True)]))
    return packed


@dataclass
class SamplePasses:
    """Token counts of samples under any pruner, by real passes as far as the last layer that prunes."""

    model: PackedLlava
    """In eval mode."""
    packed: list[Batch]
    """From `pack`."""
    images: EncodedImages
    """Theirs."""
    dtype: torch.dtype
    """bfloat16 computes under autocast."""
    seed: int
    """For scores that draw."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(int(batch.sequence.lengths.max()) for batch in self.packed)

    @property
    def token(self) -> float:
        """One token of an average sample, as a share of its tokens."""
        samples = sum(batch.sequence.samples for batch in self.packed)
        return samples / sum(len(batch.sequence) for batch in self.packed)

    @torch.inference_mode()
    def __call__(self, settings: PrunerConfig, title: str) -> dict[str, Tensor]:
        """[B] each over all samples: dense, stage1, stage2, layer_mean. `title` stands before the progress."""
        model, device = self.model, self.model.hf.lm_head.weight.device
        depth = len(model.hf.model.language_model.layers)
        places = Pruner(settings).layers(depth)
        found: dict[str, list[Tensor]] = {name: [] for name in ("dense", "stage1", "stage2", "layer_mean")}
        torch.manual_seed(self.seed)
        # every layer behind the last one that prunes sees the same tokens
        shorter = model.shortened(max(places, default=0) + 1)
        half = torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        with model.pruned_by(_in_numbers(settings, places)), shorter, half:
            cut = {name: self._cut(row).to("cpu") for row, name in enumerate(self.images.names)}
            for batch in progress(self.packed, title, lines=1):
                patches = Patches.cat([cut[name] for name in batch.images]).to(device) if batch.images else None
                trace = model.forward_packed(batch.sequence, None, patches=patches).trace
                last = trace.layers[-1]
                total = torch.stack(trace.layers).double().sum(0) + (depth - len(trace.layers)) * last
                counts = {"dense": trace.dense, "stage1": trace.stage1, "stage2": last, "layer_mean": total / depth}
                for name, value in counts.items():
                    found[name].append(value.double().cpu())
        return {name: torch.cat(values) for name, values in found.items()}

    @torch.inference_mode()
    def kept_features(self, images: int) -> Tensor:
        """[K, Dv] features of the first images that enter the projector: kept by vision-side pruning, or all."""
        if self.model.pruner.merges_projected:
            return given(self.images.features)[:images].flatten(0, 1).to(self.model.hf.lm_head.weight.device)
        return torch.cat([self._cut(row).chosen for row in range(min(images, len(self.images.names)))])

    def _cut(self, row: int) -> Patches:
        images, device = self.images, self.model.hf.lm_head.weight.device
        scores = None if images.scores is None else images.scores[row : row + 1].to(device)
        features, view = given(images.features)[row : row + 1].to(device), images.view(row, device)
        return self.model.cut_images(features, view, scores=scores)


def _in_numbers(settings: PrunerConfig, places: dict[int, int]) -> PrunerConfig:
    """The pruner with stage 2's layers as numbers, where they are shares of a depth that the model has no more."""
    stage = settings.language
    budgets = stage.per_layer_budgets
    if budgets is not None and places:
        budgets = [budgets[place] for place in places.values()]
    return replace(settings, language=replace(stage, layer=list(places) or stage.layer, per_layer_budgets=budgets))


def keep_ratio(counts: dict[str, Tensor]) -> float:
    """Tokens entering an LLM layer, averaged over layers, as a share of the dense ones, by counts of `SamplePasses`."""
    return float(counts["layer_mean"].sum() / counts["dense"].sum())


def with_knee(settings: PrunerConfig, stage: str, knee: KneeConfig) -> PrunerConfig:
    """The pruner with another budget in one stage, `vision` or `language`."""
    return replace(settings, **{stage: replace(getattr(settings, stage), knee=knee)})


def solve_keep_ratio(
    passes: SamplePasses, settings: PrunerConfig, scored: ScoredImages | None, target: float
) -> Solution | None:
    """The parameter of stage 1's budget, or of stage 2's where stage 2 runs alone, that meets a keep ratio.

    Args:
        scored: stage 1's images; None: stage 1 is off.
    Returns:
        None where the budget has no parameter.
    """
    stage = "language" if scored is None else "vision"
    knee = getattr(settings, stage).knee
    parameter = searched(knee, passes.longest if scored is None else scored.scores.shape[1])
    if parameter is None:
        return None

    def ratio(value: Value) -> float:
        changed = with_knee(settings, stage, with_value(knee, parameter.name, value))
        return keep_ratio(passes(changed, f"{knee.method} {parameter.name}={value}"))

    token = passes.token
    if scored is None:
        return solve(ratio, parameter, target, token, slack=token / 2, scan=5)
    # The keep ratio is nearly linear in the share that stage 1 keeps, which costs nothing to aim at.
    aimed = scored.solve(knee, target)
    assert aimed is not None
    if aimed.problem and aimed.problem != "out of reach":
        return aimed
    value_at: dict[Value, Value] = {}

    def at(share: Value) -> float:
        found = scored.solve(knee, share)
        assert found is not None and found.value is not None
        value_at[share] = found.value
        return ratio(found.value)

    found = solve(at, Searched("share", *aimed.reachable), target, token, slack=token / 2, scan=2)
    value = None if found.value is None else value_at[found.value]
    return replace(found, parameter=parameter, value=value)
