"""Training that has diverged ends and is told as that; no checkpoint with NaN in it is kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmprune_train.config.command import AGAIN
from mmprune_train.config.schema import TrainerConfig
from mmprune_train.data.batch import Batch
from mmprune_train.errors import NotFinite
from mmprune_train.model.llava import PackedLlava
from mmprune_train.training.callbacks import StepWatch
from mmprune_train.training.checkpoint_files import all_checkpoints
from mmprune_train.training.freezing import parts_of
from mmprune_train.training.module import MultimodalModule
from mmprune_train.training.processes import ranks_of

TOLD = 8
"""Samples of a step that a message names."""


@dataclass(eq=False)
class Divergence(StepWatch):
    """Sees to the steps that were not applied (`MultimodalModule.applied`): ends the stage at one, or counts those in a
    row. Must come before MetricsWriter, so that no row is written of a step that ends the stage."""

    checkpoints: Path
    """The stage's folder of them."""
    last: int
    """The stage's last step."""
    config: TrainerConfig
    """Whether to go on after such a step, and after how many in a row."""
    in_a_row: int = 0
    batch: Batch | None = None
    samples: list[str] = field(default_factory=list)
    """Of the step, on this rank."""
    learnt: tuple[Batch, int] | None = None
    """The last micro-batch of the newest step that was applied, and the passes of its vision tower; None: no step
    was, since the stage or its continuation began."""

    @property
    def most(self) -> int:
        """Such steps in a row that do not end the stage."""
        return self.config.max_nonfinite_steps if self.config.on_nonfinite == "skip" else 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row = state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch, self.samples = batch, [*([] if batch.place.first else self.samples), *batch.ids]

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.applied:
            assert self.batch is not None
            self.in_a_row, self.learnt = 0, (self.batch, pl_module.least_passes)
        else:
            self._pass_over(trainer, pl_module)
        if trainer.global_step == self.last and not self._still_finite(trainer, pl_module):
            end_stage(trainer, "the loss is not finite any more after the last step applied", self.checkpoints)

    def _pass_over(self, trainer: pl.Trainer, pl_module: MultimodalModule) -> None:
        self.in_a_row += 1
        what = f"{_source(pl_module)} is not finite, so the step is not applied; samples {self._told(trainer)}"
        nothing_learnt = trainer.global_step == self.last and self.learnt is None
        if self.in_a_row <= self.most and not nothing_learnt:
            if trainer.is_global_zero:
                step = f"{pl_module.stage_name} {trainer.global_step}/{self.last}"
                print(f"{step}  {what}; in a row: {self.in_a_row} of {self.most}", flush=True)
            return
        if self.in_a_row > 1:
            what += f"; such steps in a row: {self.in_a_row}"
        if broken := broken_parts(pl_module.model, trainer.strategy):
            what += f"; the weights of {', '.join(broken)} are not finite either"
        skip = "; trainer.on_nonfinite=skip goes on without such steps"
        end_stage(trainer, what, self.checkpoints, "" if self.most else skip)

    def _still_finite(self, trainer: pl.Trainer, module: MultimodalModule) -> bool:
        """Whether the newest update has left a loss that is finite, on the samples that it was made of: no step that
        was applied has looked at it."""
        assert self.learnt is not None
        batch, module.least_passes = self.learnt
        with torch.no_grad():  # through the strategy's own model: ZeRO-3 must see where a pass begins
            loss = trainer.strategy.predict_step(batch, 0)
        return not bool(trainer.strategy.reduce((~loss.isfinite()).int(), reduce_op="max"))

    def _told(self, trainer: pl.Trainer) -> str:
        """Samples of the step, on all ranks."""
        names = [name for found in ranks_of(trainer).exchange(self.samples) for name in found]
        more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
        return ", ".join(names[:TOLD]) + more


def _source(module: MultimodalModule) -> str:
    if module.step_metrics()["loss"] is None:
        return "the loss"
    parts = ", ".join(module.broken_gradients)
    return f"the gradient norm of {parts}" if parts else "the gradient norm"


def refuse_broken(trainer: pl.Trainer, checkpoints: Path) -> None:
    """End the stage where its trained weights are not finite. Every rank must call it."""
    module: Any = trainer.lightning_module
    if broken := broken_parts(module.model, trainer.strategy, trained=True):
        what = f"the weights of {', '.join(broken)} are not finite, so they are not saved"
        end_stage(trainer, what, checkpoints)


def end_stage(trainer: pl.Trainer, what: str, checkpoints: Path, more: str = "") -> NoReturn:
    """Raise NotFinite on rank 0; other ranks end in silence, and without a failure that would have a launcher end rank
    0 before it has spoken."""
    if not trainer.is_global_zero:
        raise SystemExit(0)
    module: Any = trainer.lightning_module
    done = all_checkpoints(checkpoints)
    kept = f"goes on from {done[-1]}" if done else "begins the stage anew"
    rates = ", ".join(f"{part.name} {part.lr:g}" for part in module.parts if part.lr is not None)
    raise NotFinite(
        f"stage {module.stage_name}, step {trainer.global_step}: {what}.\n{AGAIN.capitalize()} {kept}.\n"
        f"Lower stage.{module.stage_name}.lr ({rates}) or set optim.grad_clip=1.0, with another run_id= or "
        f"restart=true, or mend the samples{more}"
    )


def broken_parts(model: PackedLlava, strategy: Any, trained: bool = False) -> list[str]:
    """Parts of the network with a weight that is not finite, on any rank; every rank must call it.

    Args:
        trained: look at the trained weights alone.
    """
    broken = {
        name: ~_finite(p for p in modules.parameters() if p.requires_grad or not trained)
        for name, modules in parts_of(model).items()
    }
    flags = torch.stack([flag.int().to(strategy.root_device) for flag in broken.values()])
    found = strategy.reduce(flags, reduce_op="max").tolist()
    return [name for name, flag in zip(broken, found, strict=True) if flag]


def broken_tensors(model: torch.nn.Module) -> list[str]:
    """Names of a network's weights that are not finite."""
    return [name for name, parameter in model.named_parameters() if not bool(_finite([parameter]))]


def _finite(parameters: Iterable[Tensor]) -> Tensor:
    """Whether all values are, of what this rank holds of them: one pass, without a mask in memory; not on the host."""
    held = [_held(parameter.detach()) for parameter in parameters]
    ends = [end for part in held if part.is_floating_point() and part.numel() for end in part.aminmax()]
    return torch.stack([end.isfinite() for end in ends]).all() if ends else torch.tensor(True)


def _held(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's part
