"""PyTorch's fully sharded data parallelism (FSDP2) under Lightning, on GPUs over NCCL and on CPUs over gloo."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mmprune_train.model.llava import PackedLlava
from mmprune_train.training.sharding import broadcast


class Fsdp2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state split over the processes (Zhao et al. 2023; per parameter, as torch's
    `fully_shard` does it).

    Each LLM layer is gathered while it runs. All else (vision tower, projector, embeddings, norm and head) is gathered
    once a forward pass and kept to the end of the backward one, so that it does not matter how often a process runs
    the tower, or reads a weight from outside of its module. Checkpoints are single files like DDP's: the trained
    weights and the optimizer's state, gathered on the first process.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._setup_distributed()  # Lightning's own also wants the module, which `start_processes` does not have yet

    def shard(self, model: PackedLlava) -> None:
        """See `Sharding`. Called once, before the optimizer is made."""
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        half = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,  # the modules run under autocast
        )
        for layer in model.hf.model.language_model.layers:
            broadcast(layer, self.root_device)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        broadcast(model, self.root_device)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "forward_packed")

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole, on the first process; nothing on the others."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer state to where they belong, the rest returned. Lightning leaves out what a checkpoint
        does not have; here that is an error."""
        held = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)["state_dict"]
        self.lightning_module.check_trained(held)
        return super().load_checkpoint(checkpoint_path, weights_only)
