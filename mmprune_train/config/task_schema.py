"""What the keys of single tasks mean: what is asked, measured, planned, compared, reported. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmprune_train.config.ranges import choice, folder_name, number, positive, share
from mmprune_train.devices import CPU, DEVICES

BENCHED = ("train", "generate", "selection", "lengths")
BENCHMARKS = (
    "vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seed", "mmvet",
    "refcoco",
)  # fmt: skip
"""Public benchmarks, as docs/evaluation.md tells."""
OF_BENCHMARKS = frozenset({"benchmarks", "root", "splits", "prompts", "ocr_tokens", "box_frame"})
"""Keys of `evaluate` that are of these alone."""


@dataclass
class EvaluateConfig:
    after_train: bool = False
    """Evaluate when the last stage has ended, and print the table."""
    name: str | None = folder_name(None)
    """Of this evaluation set, where a run is asked several: each has its folder `evaluate-NAME`; null: `evaluate`."""
    turns: str = choice("all", "all", "first")
    """`all`: every turn of a conversation is a question, asked after the turns before it with their reference answers;
    `first`: the first alone."""
    limit: int | None = number(None, 1)
    """First N questions of each kind; null: all."""
    batch_size: int = number(32, 1, 10**6)
    max_new_tokens: int = number(16, 1, 10**6)
    blank: bool = True
    """Also measure with the image blanked (the mean colour), which shows what the text alone gives away."""
    kinds: list[str] = field(default_factory=list)
    """Kinds of questions to ask, by which accuracy is told; empty: every kind that the file has."""
    pruners: list[str] = field(default_factory=list)
    """Pruners to ask one checkpoint under, in one table, `[none,twostage,fastv]`; its own by name has its own settings;
    empty: its own alone."""
    budgets: list[float] = share([], "the visual tokens")
    """Shares of visual tokens, averaged over the LLM's layers, `[0.22,0.1]`: each pruner that prunes is asked once for
    each, with the parameter of its stage 1's budget that meets it (stage 2's where that runs alone); empty: as they are
    set."""
    downsample: bool = True
    """With `pruners` or `budgets`: ask also the image averaged down to as many tokens as each pruner keeps, where there
    is a pruner of that name."""
    benchmarks: list[str] = choice([], *BENCHMARKS)
    """Public benchmarks to ask in place of `data.evaluate`, `[pope,textvqa]`; a line says which are not there, the
    others are scored."""
    root: str | None = None
    """Folder of the benchmarks, as LLaVA's `playground/data/eval`: a folder each, or their TSV files."""
    splits: dict[str, str] = field(default_factory=dict)
    """Benchmark -> split, `{vqav2: test-dev}`; without one, the first that is there whose answers are known."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Benchmark -> prompt in place of LLaVA-1.5's, with `{question}` in it."""
    ocr_tokens: bool = True
    """textvqa: with the OCR tokens that LLaVA adds to the questions."""
    box_frame: str = choice("padded", "padded", "image")
    """refcoco: boxes are shares of the `padded` square, as LLaVA learns them, or of the `image`'s width and height."""


@dataclass
class GenerateConfig:
    images: list[str] = field(default_factory=list)
    """Image files, `[a.png,b.png]`. A file name with a comma wants quotes of its own: '["a, b.png"]'."""
    question: str = "What is in the image?"
    """Everything behind the `=`; `-` reads standard input. Images stand where it says `<image>`, else before it."""
    question_file: str | None = None
    """Text file with the question, in place of `question`."""
    max_new_tokens: int = number(64, 1, 10**6)


@dataclass
class ExportConfig:
    """What `task=export` makes of the model that `ckpt=` names."""

    out: str | None = None
    """Folder to write; it may not be there yet, or is empty."""
    format: str = choice("hf", "hf", "adapter", "llava")
    """`hf`: plain transformers and vLLM load it, adapters merged; `adapter`: PEFT's, unmerged; `llava`: the layout of
    LLaVA's own code, which SGLang loads, too. See docs/export.md."""
    dtype: str = choice("auto", "auto", "fp32", "bf16", "fp16")
    """Of the weights; `auto`: as they are saved, fp32 where they differ."""
    shard_gb: float = positive(5.0)
    """Most GB of a file of weights; more go into several files with an index."""
    vision_tower: str | None = None
    """llava: hub id or folder of the vision tower, by which LLaVA's code finds it; null: the run's `encoder.path`, or
    what the original checkpoint names."""
    license: str | None = None
    """Licence that the model card states, such as `apache-2.0`; null: none is stated, and the card says so."""


@dataclass
class BenchConfig:
    measure: list[str] = choice(["train", "generate"], *BENCHED)
    """`train`: optimizer steps; `generate`: answers; `selection`: stage 1 beside the vision tower, on many images;
    `lengths`: optimizer steps on different batches beside as many on one of them."""
    pruners: list[str] = field(default_factory=lambda: ["none", "twostage"])
    """Pruners to measure side by side, by name; the one that `pruner=` chooses has the command line's settings."""
    stage: str | None = None
    """Training stage whose samples, template and frozen parts are measured; null: the last of `stages`."""
    batch_size: int | None = number(None, 1, 10**6)
    """Samples of the batch; null: the stage's."""
    baseline: bool = True
    """Also measure transformers' own LlavaForConditionalGeneration: padded, dense, logits at every position."""
    cached: bool = True
    """train: also measure each pruner with a warm feature cache, where its stage 1 can be cached."""
    new_tokens: int = number(16, 2, 10**6)
    """generate: tokens that each sample writes."""
    images: int = number(16, 1, 10**6)
    """selection: images of the batch, spread over the stage's data."""
    batches: int = number(100, 1, 10**6)
    """lengths: the stage's first batches, each of other lengths; as many steps repeat the one nearest to their mean."""
    repeats: int = number(3, 1, 10**6)
    """Counted passes, interleaved; times are their medians."""


@dataclass
class CalibrateConfig:
    """What `task=calibrate` measures, and on what."""

    images: int = number(256, 1)
    """Different images to look at, drawn by `seed`; fewer where the split has fewer."""
    split: str = "instruct"
    """Training stage whose samples, template and image preparation are taken; never the questions of evaluation."""
    measure: str = choice("vision", "vision", "layer_mean")
    """`vision`: visual tokens that stage 1 keeps / dense ones; `layer_mean`: the keep ratio, tokens entering an LLM
    layer averaged over layers / dense tokens, with stage 2 in the loop."""
    target: float | None = share(0.22, "the tokens; null reports only")
    """Share to meet, the method's headline unless given; null: report only."""
    budgets: list[str] = field(default_factory=list)
    """Budgets to report; empty: all. The chosen one is always among them."""


@dataclass
class PlanConfig:
    """What `task=plan` assumes."""

    device: str | None = choice(None, *DEVICES, CPU)
    """Accelerator to plan for: `b200_180gb`, `h200_141gb`, `h100_80gb`, `h100_pcie_80gb`, `h100_nvl_94gb`, `a100_80gb`,
    `a100_40gb`, `l40s_48gb`, `rtx_a6000_48gb`, `rtx4090_24gb`, `rtx3090_24gb`, `l4_24gb`, `a10_24gb` or `cpu`; null:
    the GPU that is here, else `a100_80gb`."""
    mfu: float = share(0.4, "the device's peak")
    """Share of the device's peak throughput that a step reaches, recomputation counted as work: an assumption."""
    keep: float | None = share(None, "the visual tokens")
    """Share of visual tokens that enter an LLM layer, averaged over layers, for budgets that depend on the images (the
    `visual_keep_ratio` of metrics.jsonl); null: what a run of these settings kept, else 0.22."""
    samples: int = number(512, 1)
    """Samples of a stage whose lengths are counted, drawn by `seed`."""


@dataclass
class SweepConfig:
    """What the jobs of a sweep (`-m`) are compared by; see docs/sweeps.md."""

    objectives: list[str] = field(default_factory=lambda: ["accuracy", "keep_ratio"])
    """Numbers of a job's result.json: dotted keys (`evaluate.accuracy.open`) or the end of one, where `evaluate` comes
    before `stages`. A group is its mean: `accuracy` is the mean over the kinds of questions."""
    directions: list[str] = choice(["maximize", "minimize"], "maximize", "minimize")
    """`maximize` or `minimize`, one for each objective."""


@dataclass
class ReportConfig:
    """What `task=report` shows."""

    runs: list[str] = field(default_factory=list)
    """Run directories, sweep directories, folders of runs, or globs of them; empty: every run of this experiment."""
    output: str | None = None
    """Folder for report.html and result.json; null: `report` in the one folder that is given, else the experiment's."""
    x: str | None = None
    """Number along the figure of all runs, as in `sweep.objectives`; null: the last objective."""
    y: str | None = None
    """Number upwards, and what runs are ordered by and the heat map shows; null: the first objective."""
    heat: list[str] = field(default_factory=list)
    """The two swept keys of the heat map, rows first; empty: the first two that take several values."""
