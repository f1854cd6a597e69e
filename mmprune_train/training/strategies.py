"""Strategy names of the config to Lightning's strategies; DeepSpeed's also on CPU, where Lightning refuses it."""

from __future__ import annotations

import argparse
import os
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from mmprune_train.errors import UserError

NAMES = ("single", "ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")


def build_strategy(name: str, accelerator: str, find_unused_parameters: bool = False, batch_size: int = 1) -> Any:
    """A Lightning strategy (or the name of one).

    Args:
        name: one of `NAMES`.
        accelerator: `cpu` or `cuda`.
        find_unused_parameters: ddp only.
        batch_size: samples per device and forward pass, which DeepSpeed only reports.
    Raises:
        UserError: unknown name.
    """
    backend = "gloo" if accelerator == "cpu" else None
    if name == "single":
        return "auto"
    if name == "ddp":
        from pytorch_lightning.strategies import DDPStrategy

        return DDPStrategy(find_unused_parameters=find_unused_parameters, process_group_backend=backend)
    if name not in NAMES:
        raise UserError(f"strategy={name}: choose one of {', '.join(NAMES)}")
    # frozen weights are the base model's, which the run starts from anyway
    settings: dict[str, Any] = {
        "stage": int(name[-1]),
        "logging_batch_size_per_gpu": batch_size,
        "exclude_frozen_parameters": True,
        "process_group_backend": backend,
    }
    if accelerator == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported
        return _cpu_deepspeed(**settings)
    from pytorch_lightning.strategies import DeepSpeedStrategy

    return DeepSpeedStrategy(**settings)


def _cpu_deepspeed(**settings: Any) -> Any:
    """Lightning's DeepSpeedStrategy without its three CUDA-only steps; a function, because the import is slow."""
    import deepspeed
    from lightning_fabric.utilities.seed import reset_seed
    from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

    class CpuDeepSpeedStrategy(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            reset_seed()
            self.set_world_ranks()
            # gloo does the work; without this DeepSpeed compiles a shared-memory operator first, for minutes, and a
            # run killed meanwhile leaves a lock on which every later one waits
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            self._init_deepspeed_distributed()

        def _setup_model_and_optimizer(
            self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any = None
        ) -> tuple[Any, Optimizer]:
            engine, wrapped, _, _ = deepspeed.initialize(
                args=argparse.Namespace(),
                config=self.config,
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
            return engine, wrapped

    return CpuDeepSpeedStrategy(**settings)


def start_processes(trainer: Any) -> None:
    """Start and connect the other processes of a Trainer now, as its `fit` would, for work that they share before it.
    `fit` then finds them running."""
    launcher = trainer.strategy.launcher
    if launcher is None:
        trainer.strategy.setup_environment()
    else:
        launcher.launch(trainer.strategy.setup_environment)


def whole_weights(strategy: Any, model: Module) -> Any:
    """Context in which every parameter of `model` holds all its values (ZeRO-3 spreads them over the ranks)."""
    import contextlib

    if not getattr(strategy, "zero_stage_3", False):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None)
