"""Strategy names of the config to Lightning's strategies. docs/strategies.md says which to choose."""

from __future__ import annotations

from typing import Any

from mmprune_train.config.schema import STRATEGIES
from mmprune_train.errors import UserError


def build_strategy(name: str, accelerator: str, find_unused_parameters: bool = False, batch_size: int = 1) -> Any:
    """A Lightning strategy (or the name of one).

    Args:
        name: one of `STRATEGIES`.
        accelerator: `cpu` or `cuda`.
        find_unused_parameters: ddp only.
        batch_size: samples per device and forward pass, which DeepSpeed only reports.
    Raises:
        UserError: unknown name.
    """
    on_cpu = accelerator == "cpu"
    backend = "gloo" if on_cpu else None
    if name not in STRATEGIES:
        raise UserError(f"strategy={name}: choose one of {', '.join(STRATEGIES)}")
    if name == "single":
        return "auto"
    if name == "ddp":
        from pytorch_lightning.strategies import DDPStrategy

        return DDPStrategy(find_unused_parameters=find_unused_parameters, process_group_backend=backend)
    if name == "fsdp2":
        from mmprune_train.training.fsdp import Fsdp2Strategy

        return Fsdp2Strategy(backend)
    from mmprune_train.training.zero import ZeroStrategy

    stage, offload = int(name.removeprefix("deepspeed_zero")[0]), name.endswith("_offload")
    return ZeroStrategy(stage, offload, batch_size, on_cpu, backend)


def start_processes(trainer: Any) -> None:
    """Start and connect the other processes of a Trainer now, as its `fit` would, for work that they share before it.
    `fit` then finds them running."""
    launcher = trainer.strategy.launcher
    if launcher is None:
        trainer.strategy.setup_environment()
    else:
        launcher.launch(trainer.strategy.setup_environment)
