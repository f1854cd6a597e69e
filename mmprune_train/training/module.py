"""The LightningModule of every training stage: its loss is one mean over the global batch, however that is split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from mmprune_train.config.schema import OptimConfig
from mmprune_train.data.batch import Batch, Place
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.packed_pass import PackedOutput
from mmprune_train.pruning import PruningTrace
from mmprune_train.pruning.schedule import budget_override
from mmprune_train.training.freezing import Part
from mmprune_train.training.optim import NO_DECAY, adamw, parameter_groups, schedule
from mmprune_train.training.sharding import Sharding

TOTALS = (
    "loss_sum", "supervised", "samples", "dense", "stage1", "stage2", "layer_mean", "visual_dense", "visual_stage1",
    "visual_layer_mean", "flops", "micro_batches", "overruns", "held", "samples_truncated", "tokens_truncated",
)  # fmt: skip
"""What is summed over the micro-batches and ranks of one optimizer step; `held`: tokens that batches had room for."""

UNFINISHED = 2**40
"""Micro-batches that Lightning is told to accumulate while an optimizer step is not complete: more than there are, and
a power of two, by which a loss is divided and multiplied without rounding."""


class MultimodalModule(pl.LightningModule):
    """Trains a PackedLlava on packed batches.

    The loss of a step is the mean over the supervised tokens of all its micro-batches on all ranks, so accumulation and
    data parallelism leave it unchanged. Randomness (dropout, random scores) is a function of seed, stage, rank and
    micro-batch: no generator has a state that a resumed run would have to get back. The pruner's schedule knows only
    the optimizer step, and holds while a training step runs its forward pass.

    A step whose gradient norm is not finite leaves weights and optimizer as they were (`applied`): where DeepSpeed does
    not see to that itself, AdamW finds no gradients. A loss that is not finite makes all gradients so, by which every
    rank comes to know of it.

    Where a micro-batch stands in its optimizer step is the batch's to say (`Batch.place`), so steps may have different
    numbers of them.
    """

    def __init__(
        self,
        stage_name: str,
        model: PackedLlava,
        parts: list[Part],
        optim: OptimConfig,
        total_steps: int,
        seed: int,
        token_budget: int | None = None,
    ) -> None:
        """
        Args:
            model: frozen as `freezing.freeze` left it.
            parts: that function's report; gives each part's peak learning rate.
            total_steps: optimizer steps of the stage, on which the schedule depends.
            token_budget: tokens that may enter the LLM, a rank and micro-batch; its use is measured.
        """
        super().__init__()
        self.stage_name = stage_name
        self.model = model
        self.parts = parts
        self.optim = optim
        self.total_steps = total_steps
        self.seed = seed
        self.token_budget = token_budget
        self.flops = StepFlops(model)
        self.patches = int(model.config.image_seq_length)
        self.supervised: Tensor | int = 0
        """Of the step, over its micro-batches and all ranks; on the device where there are several."""
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.visual_squares = torch.zeros(2, dtype=torch.float64)  # samples with images; sum of their tokens^2 / images
        self.loss_sum: Tensor | float = 0.0
        """Of the step, float64 on the device: read once, at its end, so that no micro-batch waits for its loss."""
        self.norm: float | None = None
        """Of the gradients of all ranks, as `on_before_optimizer_step` reads it with the loss."""
        self.broken_gradients: list[str] = []
        """Parts whose gradients are not finite, of a step that is not applied; DeepSpeed does not tell."""
        self.rate = 0.0
        self.least_passes = 0
        """Of the vision tower in each micro-batch of the step, as `forward_packed` takes it."""

    @property
    def strict_loading(self) -> bool:  # type: ignore[override]
        """Checkpoints hold the trained weights only; `on_load_checkpoint` checks that they hold all of them."""
        return False

    # -- the step ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        place = batch.place
        key = f"{self.seed}/{self.stage_name}/{self.global_rank}/{place.step}/{place.number}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
        self._accumulate(place)
        if place.first:
            self.supervised = max(1, place.supervised)
            if self.trainer.world_size > 1:
                total = torch.full((), place.supervised, device=self.device, dtype=torch.int64)
                self.supervised = self.trainer.strategy.reduce(total, reduce_op="sum").clamp(min=1)
            if getattr(self.trainer.strategy, "zero_stage_3", False):
                passes = torch.tensor(math.ceil(place.images / self.model.execution.vision_chunk), device=self.device)
                self.least_passes = int(self.trainer.strategy.reduce(passes, reduce_op="max"))
            self.totals = dict.fromkeys(TOTALS, 0.0)
            self.visual_squares = torch.zeros(2, dtype=torch.float64)
            self.loss_sum, self.norm, self.broken_gradients = 0.0, None, []
            self.rate = float(self.trainer.optimizers[0].param_groups[-1]["lr"])

    def _accumulate(self, place: Place) -> None:
        """Let the step end where the batch says so. Lightning asks `accumulate_grad_batches` whether it has ended and
        would find the first micro-batch by it; that is found here, so `optimizer_zero_grad` is left idle."""
        self.trainer.accumulate_grad_batches = 1 if place.last else UNFINISHED
        if self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed's engine, which zeroes gradients itself
            self.trainer.model.set_gradient_accumulation_boundary(place.last)
        elif place.first:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """See `_accumulate`."""

    def forward(self, batch: Batch) -> PackedOutput:
        return self.model.forward_packed(
            batch.sequence, batch.pixel_values, patches=batch.patches, least_passes=self.least_passes
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pruner = self.model.pruner
        key = f"{self.seed}/{self.stage_name}"
        with pruner.overriding(budget_override(pruner.settings.schedule, batch.place.step, self.total_steps, key)):
            output = self.forward(batch)
        counts = output.trace.counts()
        for name in TOTALS:
            if name in counts:
                self.totals[name] += counts[name]
        self.loss_sum = self.loss_sum + output.loss_sum.detach().double()
        self.totals["supervised"] += int(output.supervised)
        self.totals["samples"] += batch.sequence.samples
        self.totals["samples_truncated"] += batch.truncated[0]
        self.totals["tokens_truncated"] += batch.truncated[1]
        self.totals["flops"] += float(self.flops(output.trace, output.trace.encoded, int(output.supervised)))
        if self.token_budget is not None:
            self.totals["micro_batches"] += 1
            self.totals["overruns"] += counts["stage1"] > self.token_budget
            self.totals["held"] += batch.sequence.ids.numel()
            self.visual_squares += _visual_squares(output.trace, self.patches)
        poison = output.loss_sum.detach() * 0 + 1  # 1, or NaN
        # undone beforehand: Lightning will divide by the accumulation, data parallelism by the ranks
        split = self.trainer.accumulate_grad_batches * self.trainer.world_size
        loss_sum = output.loss_sum
        if output.penalty is not None:  # a mean over the step's supervised tokens, as the loss is
            loss_sum = loss_sum + output.penalty * int(output.supervised)
        return loss_sum * (split / self.supervised) * poison

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A batch's summed loss. Every rank must call it at once, with a batch of its own."""
        return self.forward(batch).loss_sum

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the step's gradients, before they are clipped, and take them away where they are not finite."""
        if self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed's engine, which does both
            return
        norm = _norm(optimizer.param_groups)
        self.loss_sum, self.norm = torch.stack([torch.as_tensor(self.loss_sum, device=norm.device), norm]).tolist()
        if not self.applied:
            broken = [group["name"] for group in optimizer.param_groups if not bool(_norm([group]).isfinite())]
            self.broken_gradients = list(dict.fromkeys(name.removesuffix(NO_DECAY) for name in broken))
            optimizer.zero_grad()

    @property
    def gradient_norm(self) -> float:
        """Of the step that has just ended, over all trained weights and ranks, before clipping."""
        if self.norm is None:
            self.norm = float(self.trainer.model.get_global_grad_norm())
            assert self.applied == self.trainer.model.was_step_applied(), "DeepSpeed has another view of the step"
        return self.norm

    @property
    def applied(self) -> bool:
        """Whether the step that has just ended has changed the weights."""
        return math.isfinite(self.gradient_norm)

    def step_metrics(self) -> dict[str, Any]:
        """Metrics of the optimizer step that has just ended, over all ranks (every rank must call this); None in place
        of a loss or a norm that is not finite.

        `flops` and `images` (as `KeptTokens.observe` takes it) are for the caller's own use.
        """
        self.totals["loss_sum"] = float(self.loss_sum)
        row = torch.tensor([*self.totals.values(), *self.visual_squares.tolist()], dtype=torch.float64)
        if self.trainer.world_size > 1:
            row = self.trainer.strategy.reduce(row.to(self.device), reduce_op="sum").cpu()
        *totals, samples, squares = row.tolist()
        total = dict(zip(TOTALS, totals, strict=True))
        visual = total["visual_layer_mean"] / total["visual_dense"] if total["visual_dense"] else 1.0
        metrics = {
            "loss": _finite(total["loss_sum"] / max(1.0, total["supervised"])),
            "grad_norm": _finite(self.gradient_norm),
            "lr": self.rate,
            "samples": int(total["samples"]),
            "tokens_dense": int(total["dense"]),
            "tokens_stage1": int(total["stage1"]),
            "tokens_stage2": int(total["stage2"]),
            "tokens_layer_mean": total["layer_mean"],
            "keep_ratio": total["layer_mean"] / max(1.0, total["dense"]),
            "visual_keep_ratio": visual,
            "supervised_tokens": int(total["supervised"]),
            "samples_truncated": int(total["samples_truncated"]),
            "tokens_truncated": int(total["tokens_truncated"]),
            "steps_skipped": int(not self.applied),
            "flops": total["flops"],
            "images": (samples, total["visual_dense"] / self.patches, total["visual_stage1"], squares),
        }
        if self.token_budget is not None:
            metrics |= {
                "micro_batches": int(total["micro_batches"]) // self.trainer.world_size,
                "budget_use": total["stage1"] / (total["micro_batches"] * self.token_budget),
                "budget_overruns": int(total["overruns"]),
                "padding_tokens": int(total["held"] - total["dense"]),
            }
        return metrics

    # -- optimizer ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Where a strategy splits the weights, before the optimizer is made."""
        if isinstance(self.trainer.strategy, Sharding):
            self.trainer.strategy.shard(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = parameter_groups(self.model, self.parts, self.optim.weight_decay)
        optimizer = adamw(groups, self.optim, getattr(self.trainer.strategy, "adam", torch.optim.AdamW))
        factor = schedule(self.optim.schedule, self.total_steps, self.optim.warmup_ratio)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self._trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # else the strategy has loaded them
            self.check_trained(checkpoint["state_dict"])

    def check_trained(self, names: Iterable[str]) -> None:
        """RuntimeError unless these are the trained weights."""
        if differing := sorted(self._trained() ^ set(names)):
            raise RuntimeError(f"the checkpoint's weights are not those this stage trains: {', '.join(differing[:3])}")

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


def _norm(groups: Iterable[dict[str, Any]]) -> Tensor:
    """2-norm of the gradients of an optimizer's groups, float64, however they are sharded."""
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm(gradients)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).double()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _visual_squares(trace: PruningTrace, patches: int) -> Tensor:
    """[2] samples that have images, and the sum of (tokens left of a sample's images)^2 / images; on the device."""
    images = trace.dense_visual.double() / patches  # [B]
    squares = trace.stage1_visual.double() ** 2 / images.clamp(min=1)
    return torch.stack([(images > 0).sum().double(), squares.sum()])
