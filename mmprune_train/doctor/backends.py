"""What a run can compute with on this machine: rows of `task=doctor`, a function a section.

Libraries are imported where a row asks them, so that one that is broken breaks its own rows alone.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import metadata, util
from typing import TYPE_CHECKING

from mmprune_train.config.schema import STRATEGIES, Config, WandbConfig
from mmprune_train.doctor.machine import Ask, Note, tool
from mmprune_train.errors import UserError
from mmprune_train.training.cluster import launch, slurm_job

if TYPE_CHECKING:
    import torch

    from mmprune_train.training.precision import Precision


def chosen(config: Config) -> tuple[torch.device, Precision]:
    import torch

    from mmprune_train.training.precision import choose_accelerator, choose_precision

    accelerator = choose_accelerator(config.trainer.accelerator)
    return torch.device(accelerator), choose_precision(config.trainer.precision, accelerator)


def precision(config: Config) -> dict[str, Ask]:
    from mmprune_train.training.precision import choose_precision, hardware_bf16

    def of(accelerator: str) -> str:
        return f"auto is {choose_precision('auto', accelerator).name}: {hardware_bf16(accelerator)[1]}"

    return {kind: partial(of, kind) for kind in kinds(config)}


def kinds(config: Config) -> list[str]:
    """Types of devices that may be used here."""
    return ["cpu", "cuda"] if chosen(config)[0].type == "cuda" else ["cpu"]


def attention(config: Config) -> dict[str, Ask]:
    """Every kernel for the heads of `llm=` on the device and in the precision that training would take."""
    from mmprune_train.model.arch import arch_config
    from mmprune_train.model.attention import backend_for
    from mmprune_train.model.kernels import BACKENDS, Backend, Needs

    device, in_which = chosen(config)
    llm = arch_config("llm.arch", config.llm.arch)
    dropout = getattr(llm, "attention_dropout", 0.0) or 0.0
    head = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    needs = Needs(device, in_which.dtype, head, dropout)

    def taken() -> str:
        try:
            backend, reason = backend_for(config.trainer.attention, llm, device, in_which.dtype)
        except UserError as error:
            return Note(str(error))
        return f"{backend.name} for {config.llm.name}'s heads of {head}, {in_which.name} on {device}: {reason}"

    def can(backend: Backend) -> str:
        reason = backend.missing(needs)
        return "can run" if reason is None else f"cannot run: {reason}"

    rows: dict[str, Ask] = {f"trainer.attention={config.trainer.attention}": taken}
    return rows | {backend.name: partial(can, backend) for backend in BACKENDS}


def losses(config: Config) -> dict[str, Ask]:
    import torch

    from mmprune_train.model.loss import loss_kernel
    from mmprune_train.model.quantize import check_quantization

    def taken(kind: str) -> str:
        return " because ".join(loss_kernel(torch.device(kind)))

    def quantized() -> str:
        try:
            check_quantization(chosen(config)[0].type)
        except UserError as error:
            return f"cannot run: {str(error).partition(': ')[2]}"
        import bitsandbytes

        return f"can run, bitsandbytes {bitsandbytes.__version__}"

    return {**{f"logits on {kind}": partial(taken, kind) for kind in kinds(config)}, "peft=qlora": quantized}


def strategies(config: Config) -> dict[str, Ask]:
    import torch
    from torch import distributed

    def can(name: str) -> str:
        if name.startswith("deepspeed"):
            import deepspeed

            return f"can run, deepspeed {deepspeed.__version__}"
        return "can run" if name == "single" or distributed.is_available() else "cannot run: torch has no distributed"

    def nccl() -> str:
        if not distributed.is_nccl_available():
            return "not in this torch (GPUs need it)"
        return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "built in, no GPU"

    def started() -> str:
        found = launch(config.trainer.devices)
        if found is None:
            return "the user alone"
        return f"{found.by}: process {found.rank} of {found.processes}"

    rows: dict[str, Ask] = {f"strategy={name}": partial(can, name) for name in STRATEGIES}
    rows |= {"NCCL": nccl, "gloo": lambda: "built in" if distributed.is_gloo_available() else Note("not in this torch")}
    rows |= {"started by": started, "Slurm job": lambda: slurm_job() or "none"}
    return rows | {"srun": partial(tool, "srun")}


def operators(config: Config) -> dict[str, Ask]:
    """DeepSpeed's, which it compiles when one is first used."""

    from deepspeed.git_version_info import installed_ops as compiled
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    def state(name: str) -> str:
        if compiled.get(name):
            return "compiled"
        return "can be compiled" if ALL_OPS[name].is_compatible(verbose=False) else "cannot be compiled here"

    rows: dict[str, Ask] = {name: partial(tool, name) for name in ("ninja", "c++")}
    return rows | {name: partial(state, name) for name in sorted(ALL_OPS)}


def loggers(config: Config) -> dict[str, Ask]:
    """Libraries, and whether there is an account, never which."""

    def library(name: str) -> str:
        if util.find_spec(name) is None:
            return "not installed"
        __import__(name)
        return f"installed, {metadata.version(name)}"

    def wandb_account() -> str:
        from mmprune_train.training.loggers import has_wandb_account, wandb_offline

        mode = "offline" if wandb_offline(config.logger.wandb or WandbConfig()) else "online"
        return f"logged in: {'yes' if has_wandb_account() else 'no'}; runs would be {mode}"

    def hub() -> str:
        from huggingface_hub import get_token

        return f"logged in: {'yes' if get_token() else 'no'}"

    rows: dict[str, Ask] = {name: partial(library, name) for name in ("tensorboard", "wandb", "mlflow", "trackio")}
    return {**rows, "wandb account": wandb_account, "Hugging Face account": hub}


def self_test(config: Config) -> dict[str, Ask]:
    """A step on every device in the precision that `auto` takes there, the processor's in fp32 first: the reference of
    the others."""
    import torch

    from mmprune_train.doctor.self_test import check_near, losses_of_steps
    from mmprune_train.training.precision import Precision, choose_precision

    exact = Precision(torch.float32, "the reference")
    gpus = range(torch.cuda.device_count() if "cuda" in kinds(config) else 0)
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]
    tries = [(devices[0], exact), *((device, choose_precision("auto", device.type)) for device in devices)]
    reference = cache(partial(losses_of_steps, torch.device("cpu"), exact))

    def step(device: torch.device, precision: Precision) -> str:
        if (device.type, precision.name) == ("cpu", "fp32"):
            return reference()[1]
        found, says = losses_of_steps(device, precision)
        check_near(found, reference()[0])
        return says

    return {f"{device}, {precision.name}": partial(step, device, precision) for device, precision in tries}
