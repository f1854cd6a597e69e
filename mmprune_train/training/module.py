"""The LightningModules: a loss that is one mean over the whole global batch, whatever it was split into."""

from __future__ import annotations

import hashlib
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from mmprune_train.config.schema import OptimConfig
from mmprune_train.data.batch import Batch
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning.schedule import pace
from mmprune_train.training.freezing import Part
from mmprune_train.training.optim import adamw, parameter_groups, schedule

TOTALS = (
    "loss_sum",
    "supervised",
    "samples",
    "dense",
    "stage1",
    "stage2",
    "layer_mean",
    "visual_dense",
    "visual_layer_mean",
    "flops",
)
"""What is summed over the micro-batches and ranks of one optimizer step."""


class MultimodalModule(pl.LightningModule):
    """Trains a PackedLlava on packed batches.

    The loss of a step is the mean over the supervised tokens of all its micro-batches on all ranks, so accumulation and
    data parallelism leave it unchanged. Randomness (dropout, random scores) is a function of seed, stage, rank and
    micro-batch: no generator has a state that a resumed run would have to get back. The pruner's schedule knows only
    the optimizer step, and holds while a training step runs its forward pass.
    """

    stage_name = "?"

    def __init__(self, model: PackedLlava, parts: list[Part], optim: OptimConfig, total_steps: int, seed: int) -> None:
        """Args:
        model: frozen as `freezing.freeze` left it.
        parts: that function's report; gives each part's peak learning rate.
        optim: optimizer and schedule.
        total_steps: optimizer steps of the stage, on which the schedule depends.
        seed: the run's seed.
        """
        super().__init__()
        self.model = model
        self.parts = parts
        self.optim = optim
        self.total_steps = total_steps
        self.seed = seed
        self.flops = StepFlops(model)
        self.window_supervised = 0
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.rate = 0.0

    @property
    def strict_loading(self) -> bool:  # type: ignore[override]
        """Checkpoints hold the trained weights only; `on_load_checkpoint` checks that they hold all of them."""
        return False

    # -- the step ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        key = f"{self.seed}/{self.stage_name}/{self.global_rank}/{batch_idx}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            total = torch.tensor(batch.window_supervised, device=self.device, dtype=torch.int64)
            self.window_supervised = int(self.trainer.strategy.reduce(total, reduce_op="sum"))
            self.totals = dict.fromkeys(TOTALS, 0.0)
            self.rate = float(self.trainer.optimizers[0].param_groups[-1]["lr"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pruner = self.model.pruner
        step = batch_idx // self.trainer.accumulate_grad_batches
        now = pace(pruner.settings.schedule, step, self.total_steps, f"{self.seed}/{self.stage_name}")
        with pruner.paced(now):
            output = self.model.forward_packed(batch.sequence, batch.pixel_values, patches=batch.patches)
        counts = output.trace.counts()
        for name in TOTALS:
            if name in counts:
                self.totals[name] += counts[name]
        self.totals["loss_sum"] += float(output.loss_sum.detach())
        self.totals["supervised"] += int(output.supervised)
        self.totals["samples"] += batch.sequence.samples
        self.totals["flops"] += float(self.flops(output.trace, output.trace.encoded, int(output.supervised)))
        return output.loss_sum * (self._split() / max(1, self.window_supervised))

    def _split(self) -> float:
        """What will divide the loss on its way to the gradients, to be undone beforehand.

        Lightning divides by the accumulation, data parallelism by the ranks; DeepSpeed's engine divides by the
        accumulation once more.
        """
        trainer = self.trainer
        engine = trainer.accumulate_grad_batches if trainer.strategy.handles_gradient_accumulation else 1
        return trainer.accumulate_grad_batches * engine * trainer.world_size

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the optimizer step that has just ended, over all ranks (every rank must call this)."""
        row = torch.tensor(list(self.totals.values()), dtype=torch.float64)
        if self.trainer.world_size > 1:
            row = self.trainer.strategy.reduce(row.to(self.device), reduce_op="sum").cpu()
        total = dict(zip(TOTALS, row.tolist(), strict=True))
        visual = total["visual_layer_mean"] / total["visual_dense"] if total["visual_dense"] else 1.0
        return {
            "loss": total["loss_sum"] / max(1.0, total["supervised"]),
            "lr": self.rate,
            "samples": int(total["samples"]),
            "tokens_dense": int(total["dense"]),
            "tokens_stage1": int(total["stage1"]),
            "tokens_stage2": int(total["stage2"]),
            "tokens_layer_mean": total["layer_mean"],
            "keep_ratio": total["layer_mean"] / max(1.0, total["dense"]),
            "visual_keep_ratio": visual,
            "supervised_tokens": int(total["supervised"]),
            "flops": total["flops"],
        }

    # -- optimizer ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(parameter_groups(self.model, self.parts, self.optim.weight_decay), self.optim)
        factor = schedule(self.optim.schedule, self.total_steps, self.optim.warmup_ratio)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self._trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" not in checkpoint:  # DeepSpeed loads its own
            return
        differing = sorted(self._trained() ^ set(checkpoint["state_dict"]))
        if differing:
            raise RuntimeError(f"the checkpoint's weights are not those this stage trains: {', '.join(differing[:3])}")

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


class PretrainModule(MultimodalModule):
    """Stage one: align the projector on captions."""

    stage_name = "pretrain"


class InstructModule(MultimodalModule):
    """Stage two: instruction tuning of the projector and the LLM, or of its adapters."""

    stage_name = "instruct"


MODULES: dict[str, type[MultimodalModule]] = {m.stage_name: m for m in (PretrainModule, InstructModule)}
