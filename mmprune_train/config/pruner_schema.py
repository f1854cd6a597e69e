"""What every key of `pruner` and `knee` means; see `schema.py` for the rest of a run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmprune_train.config.ranges import COUNT, number, positive, share


@dataclass
class KneeConfig:
    """How many of the sorted scores to keep: the budget method and its parameters."""

    method: str = "kneedle"
    """`kneedle`, `max_chord`, `l_method`, `menger`, `second_difference`, `otsu`, `iqr`, `lof`, `cumulative_mass`,
    `attention_entropy`, `effective_rank`, `fixed_ratio` or `fixed_count`; see docs/budgets.md."""
    sensitivity: float = number(1.0, 0, 1e6)
    """kneedle: S of Satopaa et al. 2011; larger waits longer before it calls a bend a knee."""
    no_knee: str = "keep_all"
    """kneedle: what to do with a curve that has no knee: `keep_all` or `max_chord`."""
    factor: float = number(1.5, 0, 1e6)
    """iqr: interquartile ranges above the third quartile where an outlier begins; larger keeps fewer."""
    neighbors: int = number(20, 1)
    """lof: neighbours whose density an outlier falls short of; a shorter row uses all it has."""
    mass: float = share(0.9, "the scores' sum")
    """cumulative_mass: share of the scores' sum that is kept."""
    scale: float = positive(1.0, 1e6)
    """attention_entropy, effective_rank: tokens kept per token of spread or per dimension."""
    ratio: float = share(0.25, "the tokens")
    """fixed_ratio: share of the row to keep."""
    count: int = number(64, 1)
    """fixed_count: tokens to keep."""
    min_tokens: int = number(1, 0)
    """Never keep fewer than this (or than the row has)."""
    max_tokens: int | None = number(None, 1)
    """Never keep more than this; null: no limit."""


def _follow(group: str) -> Any:
    """A KneeConfig whose every leaf follows the chosen `knee` group, so one leaf can be overridden alone."""
    return lambda: KneeConfig(**{key: f"${{{group}.{key}}}" for key in KneeConfig.__dataclass_fields__})  # type: ignore[arg-type]


@dataclass
class RecoverConfig:
    """A second pass of stage 1 over what the first one dropped; what it keeps joins what the first one kept."""

    enabled: bool = False
    score: str = "text_similarity"
    """Any stage-1 score."""
    knee: KneeConfig = field(default_factory=_follow("knee"))
    """How many of the dropped patches come back; here `min_tokens` may be 0."""


@dataclass
class VisionStageConfig:
    """Stage 1: drop patches after the vision encoder, per image."""

    enabled: bool = True
    score: str = "cls_attention"
    """`cls_attention`, `cls_attention_wide`, `cls_cosine` (encoders with CLS), `map_attention` (SigLIP),
    `text_similarity`, `text_similarity_bare`, `text_dissimilarity` (CLIP with its text tower), `pooled_cosine`,
    `feature_norm`, `uniform_grid` or `random`; `docs/scores.md` says what each is."""
    layer: int | None = number(None, -10_000, 10_000)
    """Encoder block, from 0 or negative from the end, whose queries and keys give the `cls_attention` scores and the
    keys of merges, and whose output the text scores read; null: the block that made the feature layer."""
    knee: KneeConfig = field(default_factory=_follow("knee"))
    selection: str = "top"
    """Which patches the budget keeps: `top` (the best scores), `max_min`, `dpp`, `top_and_uniform` or
    `top_and_distinct`; see `docs/methods.md`."""
    share: float = number(0.5, 0, 1, says=": the share of the budget that goes by score")
    """top_and_distinct: share of the budget that goes by score."""
    space: str = "features"
    """What diverse selections measure distances on: the encoder's `features`, or `projected`: after the projector."""
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    merge: str = "none"
    """What dropped patches leave behind: `none`, `nearest`, `mean_token`, `prumerge`, `contextual` or `centres`."""
    merge_count: int = number(32, 1)
    """prumerge, centres: neighbours a patch takes in; contextual: tokens made of dropped patches."""
    order: str = "raster"
    """How kept patches enter the LLM: `raster`, or `rank`: best score first, tokens that a merge made last."""
    positions: str = "contiguous"
    """Position ids after pruning: `contiguous` (renumbered) or `original`."""


@dataclass
class LanguageStageConfig:
    """Stage 2: drop visual and prompt-text tokens inside the LLM, per turn of a sample."""

    enabled: bool = True
    score: str = "text_attention"
    """`text_attention`, `text_cosine`, `last_token_attention`, `key_norm` or `random`; see `docs/scores.md`."""
    signal: str = "next"
    """Whose queries and keys give the score: the `next` layer, the first that sees the short sequence, or the
    `previous` one (FastV, SparseVLM)."""
    turns: str = "first"
    """Which questions vote on a token of a sample with several turns: `first`: the one of its own turn alone; `mean` or
    `max`: that one and all later ones, the score being their mean or maximum. With these two, what an earlier answer
    may attend to in training depends on questions asked after it, which chat cannot know: a leak, by name."""
    raters: str = "all"
    """Which question tokens vote: `all`, or `relevant`: those that the visual tokens attend to more than to the average
    one where they enter the LLM (SparseVLM)."""
    layer: Any = 2
    """First LLM layer that sees the short sequence: its index from 0, or a share of the LLM's depth (0.25), or a rising
    list of them (a pyramid)."""
    knee: KneeConfig = field(default_factory=_follow("knee"))
    amounts: list[float] | None = positive(None, COUNT)
    """One for each layer, in place of `knee.ratio` (fixed_ratio; a share of what that layer still has) or `knee.count`
    (fixed_count); null: the same budget at every layer."""
    candidates: str = "visual_and_text"
    """What may be dropped: `visual_and_text` (visual and prompt-text tokens) or `visual`."""
    ranking: str = "per_kind"
    """`per_kind`: a turn's visual tokens have a curve and a knee of their own, its text tokens another; `joint`: both
    kinds share one, where text, which attends to its neighbours, leaves few visual tokens."""
    min_per_image: int = number(1, 0)
    """Visual tokens of every image that stay at each pruning layer, whatever the budget: the image's best, in exchange
    for the lowest-ranked others of its turn, or beyond the count where that is smaller. 0: a turn of several images may
    lose all tokens of one."""
    no_text: str = "keep_all"
    """A turn without question text (the plain template): `keep_all` or `last_token_attention`."""
    merge: str = "none"
    """What dropped visual tokens leave behind: `none`, or `recycle`: the best of them, as means of clusters."""
    merge_share: float = share(0.3, "the dropped tokens")
    """recycle: share of a turn's dropped visual tokens, best score first, that are clustered; at least one."""
    merge_size: int = number(10, 1)
    """recycle: tokens a cluster has on average."""
    positions: str = "original"
    """Position ids after pruning: `original` or `contiguous`."""


@dataclass
class ScheduleConfig:
    """How the budgets move over the steps of each training stage. Where nothing is trained they hold as they are."""

    name: str = "constant"
    """`constant`: they do not move; `anneal`: everything is kept at first, the budgets' counts later; `random`: each
    optimizer step draws a share that takes the place of the budgets' counts."""
    applies_to: list[str] = field(default_factory=lambda: ["vision", "language"])
    """Pruning stages whose budgets move: `vision`, `language` or both."""
    start: float = number(0.1, 0, 1, says=": a share of the steps")
    """anneal: share of the steps before which everything is kept."""
    end: float = number(0.6, 0, 1, says=": a share of the steps")
    """anneal: share of the steps from which on the budgets' own counts are kept."""
    shape: str = "cosine"
    """anneal: how it falls in between, `cosine` or `linear`."""
    low: float = share(0.1, "the tokens")
    """random: smallest share of a row's tokens that a step may keep."""
    high: float = share(1.0, "the tokens")
    """random: largest one."""


@dataclass
class PrunerConfig:
    name: str = "twostage"
    vision: VisionStageConfig = field(default_factory=VisionStageConfig)
    language: LanguageStageConfig = field(default_factory=LanguageStageConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
