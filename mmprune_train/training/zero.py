"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) and ZeRO-Offload (Ren et al. 2021) under Lightning; also on CPUs over
gloo, where Lightning refuses it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from mmprune_train.model.llava import PackedLlava
from mmprune_train.storage.user_files import reason_of
from mmprune_train.training.sharding import from_first, replace_tensors


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO of one stage, with or without offload.

    Under ZeRO-3 each parameter is gathered when a module that owns it is called, on all processes at once: every
    process must call the same modules equally often in a pass.
    """

    def __init__(
        self, stage: int, offload: bool, batch_size: int, on_cpu: bool, process_group_backend: str | None
    ) -> None:
        """
        Args:
            stage: 1, 2 or 3.
            offload: optimizer state in the host's memory, under ZeRO-3 also the parameters.
            batch_size: samples per device and forward pass, which DeepSpeed only reports.
            on_cpu: compute on CPUs.
        """
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            pin_memory=offload and not on_cpu,
            logging_batch_size_per_gpu=batch_size,
            exclude_frozen_parameters=True,  # they are the base model's, which the run starts from anyway
            process_group_backend=process_group_backend,
        )
        self.on_cpu = on_cpu
        self.offload = offload
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # `adam` decides

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # Lightning's own refuses CPUs

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            super().setup_distributed()
            return
        import deepspeed

        reset_seed()
        self.set_world_ranks()
        # gloo does the work; without this DeepSpeed compiles a shared-memory operator first, for minutes, and a run
        # killed meanwhile leaves a lock on which every later one waits
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Optimizer]:
        import deepspeed

        index = self.root_device.index
        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(**({} if index is None else {"device_rank": index})),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped

    def adam(self, groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
        """AdamW where the optimizer's state is: DeepSpeed's vectorised one for offloaded state beside a GPU, if its
        operator compiles here; torch's elsewhere."""
        if not self.offload or self.on_cpu:
            return torch.optim.AdamW(groups, **settings)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        except Exception as error:  # of the compiler, of many kinds
            reason = reason_of(error)
            if self.is_global_zero:
                print(
                    f"optimizer: torch's AdamW; DeepSpeed's faster CPU Adam does not work here ({reason})", flush=True
                )
            return torch.optim.AdamW(groups, **settings)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing is built in it: `shard` splits the network that is there."""
        yield

    def shard(self, model: PackedLlava) -> None:
        """See `Sharding`; only ZeRO-3 splits weights. DeepSpeed sends the first process's values itself, one parameter
        after the other, before it splits each."""
        if not self.zero_stage_3:
            return
        import deepspeed

        self._init_config_if_needed()
        half = self.precision_plugin.precision == "bf16-mixed"

        def prepared(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                return from_first(tensor, self.root_device)
            cast = tensor.detach().to(torch.bfloat16 if half and tensor.is_floating_point() else tensor.dtype)
            # memory that is never written to is none: what is not the first process's is filled and split one by one
            return torch.empty_like(cast, device="cpu") if cast.is_meta else cast

        replace_tensors(model, prepared)
        deepspeed.zero.Init(module=model, config_dict_or_path=self.config)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            return parameter.detach().clone()
