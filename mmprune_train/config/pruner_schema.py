"""What every key of `pruner` and `knee` means; see `schema.py` for the rest of a run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmprune_train.components.declare import COUNT
from mmprune_train.components.registry import default_of, library
from mmprune_train.config.ranges import choice, folder_name, number, positive, share


def _short(name: str) -> Any:
    """A field that stands for `args.NAME` of the budgets that have this parameter, in the range that they declare."""
    found = (one.parameter(name) for one in library()["budget"].values())
    return field(default=None, metadata={"range": next(one.range for one in found if one)})


@dataclass
class KneeConfig:
    """How many of the sorted scores to keep: the budget method and its parameters."""

    method: str = default_of("knee.method")
    """A budget of docs/budgets.md (`--help` lists them), or a function of yours as `module:function`."""
    args: dict[str, Any] = field(default_factory=dict)
    """The method's parameters, by name. Each key below is short for one of them; null: the method's default."""
    sensitivity: float | None = _short("sensitivity")
    """Short for args.sensitivity: S of Satopaa et al. 2011; larger waits longer before it calls a bend a knee."""
    no_knee: str | None = _short("no_knee")
    """Short for args.no_knee: what to do with a curve that has no knee."""
    factor: float | None = _short("factor")
    """Short for args.factor: interquartile ranges above the third quartile where an outlier begins."""
    neighbors: int | None = _short("neighbors")
    """Short for args.neighbors: neighbours whose density an outlier falls short of."""
    mass: float | None = _short("mass")
    """Short for args.mass: share of the scores' sum that is kept."""
    scale: float | None = _short("scale")
    """Short for args.scale: tokens kept for each token that the entropy counts, or for each dimension."""
    ratio: float | None = _short("ratio")
    """Short for args.ratio: share of the row to keep."""
    count: int | None = _short("count")
    """Short for args.count: tokens to keep."""
    min_tokens: int = number(1, 0)
    """Never keep fewer than this (or than the row has)."""
    max_tokens: int | None = number(None, 1)
    """Never keep more than this; null: no limit."""


SHORTS = ("sensitivity", "no_knee", "factor", "neighbors", "mass", "scale", "ratio", "count")
"""Keys of a budget that are short for one of its parameters."""


def _follow(group: str) -> Any:
    """A KneeConfig whose every leaf follows the chosen `knee` group, so one leaf can be overridden alone. Its `args`
    are its own; those of the group come with its method (`config/knee.py`)."""
    leaves = [key for key in KneeConfig.__dataclass_fields__ if key != "args"]
    return lambda: KneeConfig(**{key: f"${{{group}.{key}}}" for key in leaves})  # type: ignore[arg-type]


@dataclass
class RecoverConfig:
    """A second pass of stage 1 over what the first one dropped; what it keeps joins what the first one kept."""

    enabled: bool = False
    score: str = default_of("pruner.vision.recover.score")
    """Any stage-1 score."""
    score_args: dict[str, Any] = field(default_factory=dict)
    """Its parameters."""
    layer: Any = None
    """Encoder block that this pass looks at, written as `pruner.vision.layer`; null: the first pass's."""
    knee: KneeConfig = field(default_factory=_follow("knee"))
    """How many of the dropped patches come back; here `min_tokens` may be 0."""
    counted: str = choice("dropped", "dropped", "all")
    """What the budget looks at: the `dropped` patches alone, or `all`, those kept having the image's lowest score; then
    the share that it says is taken of the dropped ones (Recoverable Compression)."""


@dataclass
class VisionStageConfig:
    """Stage 1: drop patches after the vision encoder, per image."""

    enabled: bool = True
    score: str = default_of("pruner.vision.score")
    """A stage-1 score of docs/scores.md (`--help` lists them), or a function of yours as `module:function`."""
    score_args: dict[str, Any] = field(default_factory=dict)
    """The score's parameters, by name."""
    layer: Any = None
    """Encoder block, from 0, negative from the end, or a share of the depth (0.25), whose queries and keys give the CLS
    token's attention and the keys of merges, and whose output the text scores read; null: the block that made the
    feature layer."""
    knee: KneeConfig = field(default_factory=_follow("knee"))
    selection: str = default_of("pruner.vision.selection")
    """Which patches the budget keeps: a selection of docs/methods.md, or a function of yours as `module:function`."""
    selection_args: dict[str, Any] = field(default_factory=dict)
    """The selection's parameters, by name."""
    space: str = choice("features", "features", "projected")
    """What selections see of the patches: the encoder's `features`, or `projected`: these after the projector."""
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    noise: float = number(1.0, 0, 1000)
    """Of a score with weights, while they are trained: scale of the logistic noise on the scores by which patches are
    chosen, so that dropped ones come to be tried; 0: none."""
    target: float | None = share(None, "the patches")
    """Of a score with weights, with a budget that keeps the scores above 0: share of the patches that it is to keep in
    the mean over a micro-batch's images; what is above or below adds its square to the loss. null: no such term."""
    target_weight: float = positive(1.0, COUNT)
    """Factor of that term."""
    merge: str = "none"
    """What dropped patches leave behind: `none`, a merge of docs/methods.md, or a function of yours as
    `module:function`."""
    merge_args: dict[str, Any] = field(default_factory=dict)
    """The merge's parameters, by name."""
    merge_space: str = choice("features", "features", "projected")
    """What a merge adds up: the encoder's `features` of the patches, or `projected`: these after the projector, which
    then runs on all patches, with gradient."""
    keep_cls: bool = False
    """The encoder's CLS token enters the LLM, too, in front of the patches (VisionZip). It takes the place of a dropped
    patch: an image that is kept whole has none."""
    question_ends: list[str] = field(default_factory=list)
    """Scores read the question up to the first of these texts: what a data set adds about the answer's format, or
    \"\\n\", for the first line alone. []: all of it."""
    order: str = choice("raster", "raster", "made_last", "made_ranked", "rank")
    """How what is kept enters the LLM: `raster`, where a token that a merge made stands in a dropped patch's place;
    `made_last`: made tokens behind all patches, both in raster order; `made_ranked`: the same, the made ones by the
    score of the patch whose place they took, best first; `rank`: patches by score, best first, made tokens last."""
    positions: str = choice("contiguous", "contiguous", "original")
    """Position ids after pruning: `contiguous` (renumbered) or `original`."""


@dataclass
class LanguageStageConfig:
    """Stage 2: drop visual and prompt-text tokens inside the LLM, per turn of a sample."""

    enabled: bool = True
    score: str = default_of("pruner.language.score")
    """A stage-2 score of docs/scores.md (`--help` lists them), or a function of yours as `module:function`."""
    score_args: dict[str, Any] = field(default_factory=dict)
    """The score's parameters, by name."""
    score_layer: str = choice("current", "current", "previous")
    """Whose queries and keys give the score: the `current` layer, the first that sees the short sequence, or the
    `previous` one (FastV, SparseVLM)."""
    turns: str = choice("first", "first", "mean", "max", "last")
    """Which questions score a token of a sample with several turns: `first`: the one of its own turn alone; `mean` or
    `max`: that one and all later ones, the score being their mean or maximum; `last`: the sample's last one. With these
    three, what an earlier answer may attend to in training depends on questions asked after it, which chat cannot know:
    a leak, by name."""
    turns_in_generation: str | None = choice(None, "first", "last")
    """`turns` of samples that end in a question, which is to be answered; null: as `turns`. There `last` leaks nothing
    (FastV, PyramidDrop); a further question of a chat then ranks anew what an earlier one has, so that no cache can be
    gone on with."""
    selection: str = default_of("pruner.language.selection")
    """Which candidates the budget keeps: a stage-2 selection of docs/methods.md, or a function of yours as
    `module:function`."""
    selection_args: dict[str, Any] = field(default_factory=dict)
    """The selection's parameters, by name."""
    query_tokens: str = choice("all", "all", "relevant")
    """Which question tokens score the others: `all`, or `relevant`: those that the visual tokens attend to more than to
    the average one where they enter the LLM (SparseVLM)."""
    layer: Any = 2
    """First LLM layer that sees the short sequence: its index from 0, or a share of the LLM's depth (0.25), or a rising
    list of them (a pyramid)."""
    knee: KneeConfig = field(default_factory=_follow("knee"))
    per_layer_budgets: list[float] | None = positive(None, COUNT)
    """One for each layer, in place of `knee.ratio` (a share of what that layer still has) or `knee.count`, where the
    budget is one of the fixed ones; null: the same budget at every layer."""
    candidates: str = choice("visual_and_text", "visual_and_text", "visual")
    """What may be dropped: `visual_and_text` (visual and prompt-text tokens) or `visual`."""
    ranking: str = choice("per_kind", "per_kind", "joint")
    """`per_kind`: a turn's visual tokens have a curve and a knee of their own, its text tokens another; `joint`: both
    kinds share one, where text, which attends to its neighbours, leaves few visual tokens."""
    min_per_image: int = number(1, 0)
    """Visual tokens of every image that stay at each pruning layer, whatever the budget: the image's best, in exchange
    for the lowest-ranked others of its turn, or beyond the count where that is smaller. 0: a turn of several images may
    lose all tokens of one."""
    no_text: str = choice("keep_all", "keep_all", "last_token_attention")
    """A turn without question text (the plain template): `keep_all` or `last_token_attention`."""
    merge: str = "none"
    """What dropped visual tokens leave behind: `none`, a stage-2 merge of docs/methods.md, or a function of yours."""
    merge_args: dict[str, Any] = field(default_factory=dict)
    """The merge's parameters, by name."""
    order: str = choice("in_place", "in_place", "made_last")
    """Where tokens that a merge made stand: `in_place` of a dropped one, or `made_last`: behind the visual tokens that
    are left of their image (SparseVLM)."""
    positions: str = choice("original", "contiguous", "original")
    """Position ids after pruning: `original` or `contiguous`."""


@dataclass
class ScheduleConfig:
    """How the budgets move over the steps of each training stage. Where nothing is trained they hold as they are."""

    name: str = choice("constant", "constant", "anneal", "random")
    """`constant`: they do not move; `anneal`: everything is kept at first, the budgets' counts later; `random`: each
    optimizer step draws a share that takes the place of the budgets' counts."""
    applies_to: list[str] = choice(["vision", "language"], "vision", "language")
    """Pruning stages whose budgets move: `vision`, `language` or both."""
    start: float = number(0.1, 0, 1, says=": a share of the steps")
    """anneal: share of the steps before which everything is kept."""
    end: float = number(0.6, 0, 1, says=": a share of the steps")
    """anneal: share of the steps from which on the budgets' own counts are kept."""
    shape: str = choice("cosine", "cosine", "linear")
    """anneal: how it falls in between, `cosine` or `linear`."""
    low: float = share(0.1, "the tokens")
    """random: smallest share of a row's tokens that a step may keep."""
    high: float = share(1.0, "the tokens")
    """random: largest one."""


@dataclass
class PrunerConfig:
    name: str = folder_name("twostage")
    vision: VisionStageConfig = field(default_factory=VisionStageConfig)
    language: LanguageStageConfig = field(default_factory=LanguageStageConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
