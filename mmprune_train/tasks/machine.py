"""What this machine offers a run, section by section: the rows of `task=doctor` and how each is found.

Libraries are imported where a row asks them, so that one that is broken breaks its own rows alone.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from mmprune_train.assets import cache_dir
from mmprune_train.config.checks import STRATEGIES
from mmprune_train.config.schema import Config, WandbConfig
from mmprune_train.devices import GIB, known_device
from mmprune_train.errors import UserError
from mmprune_train.training.cluster import launch, slurm_job

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

    from mmprune_train.training.precision import Precision

PACKAGE = "mmprune_train"
FEW_FILES = 4096
"""Open files below which many loader workers run out of them. Our choice, like the two that follow."""
LITTLE_SHARED = 1 * GIB
LITTLE_DISK = 10 * GIB
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "HF_HUB_OFFLINE", "WANDB_MODE",
)  # fmt: skip
"""What is shown of the environment: nothing else, since anything else may be a secret."""
TEST = "self-test"


class Note(str):
    """What a row says, where it wants attention."""


Ask = Callable[[], str]
"""Finds what a row says, or raises."""


# ---------------------------------------------------------------------- software and processors


def versions(config: Config) -> dict[str, Ask]:
    from mmprune_train.training.rundir import git_commit

    own: dict[str, Ask] = {PACKAGE: lambda: metadata.version(PACKAGE), "python": platform.python_version}
    found = {wanted.name: partial(version_of, wanted, optional) for wanted, optional in requirements()}
    return {**own, "git commit": lambda: git_commit() or "not a checkout", **found}


def requirements() -> list[tuple[Requirement, bool]]:
    """Packages that this project needs, and those of its extra `gpu`; of each whether it is optional."""
    from packaging.requirements import Requirement

    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():  # not always installed, or when it asked for others
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        needed, optional = project["dependencies"], project["optional-dependencies"]["gpu"]
        return [(Requirement(line), line in optional) for line in (*needed, *optional)]
    listed = map(Requirement, metadata.requires(PACKAGE) or ())
    asked = [one for one in listed if one.marker is None or one.marker.evaluate({"extra": "gpu"})]
    return [(one, one.marker is not None and "extra" in str(one.marker)) for one in asked]


def version_of(wanted: Requirement, optional: bool) -> str:
    """A package's version; a note where this project wants another one, be it for its bugs or its holes."""
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return "not installed, optional" if optional else Note(f"not installed; pip install '{wanted}'")
    if wanted.specifier.contains(version, prereleases=True):
        return version
    return Note(f"{version}, known not to do: pip install '{wanted.name}{wanted.specifier}'")


def processor(config: Config) -> dict[str, Ask]:
    def cores() -> str:
        return f"{os.cpu_count()}, {len(os.sched_getaffinity(0))} of them for this process"

    def threads() -> str:
        import torch

        if "OMP_WAIT_POLICY" in os.environ or torch.get_num_threads() == 1:
            return f"{torch.get_num_threads()}"
        return Note(f"{torch.get_num_threads()}; on a busy machine OMP_WAIT_POLICY=PASSIVE keeps them from spinning")

    def memory() -> str:
        page = os.sysconf("SC_PAGE_SIZE") / GIB
        return f"{page * os.sysconf('SC_AVPHYS_PAGES'):.1f} GiB free of {page * os.sysconf('SC_PHYS_PAGES'):.1f} GiB"

    return {"machine": platform.platform, "cores": cores, "threads of torch": threads, "memory": memory}


def gpus(config: Config) -> dict[str, Ask]:
    import torch

    count = torch.cuda.device_count()
    rows: dict[str, Ask] = {
        "torch is built for": lambda: f"CUDA {torch.version.cuda}" if torch.version.cuda else "the processor alone",
        "devices": lambda: str(count) if torch.cuda.is_available() else "0: no CUDA device is visible",
        "driver": driver,
        "compiler (nvcc)": lambda: (
            shutil.which("nvcc") or "not found; FlashAttention and DeepSpeed's operators need it"
        ),
    }
    for index in range(count):
        rows[f"cuda:{index}"] = partial(gpu, index)
    if count > 1:
        rows["peer access"] = partial(peers, count)
    return rows


def driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(asked[0]) is None:
        return "nvidia-smi not found"
    told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    return ", ".join(dict.fromkeys(told))


def gpu(index: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(index)
    free, whole = torch.cuda.mem_get_info(index)
    known = known_device(about.name)
    rate = f"{known.tflops:g} TFLOP/s in bf16 by its data sheet" if known else "throughput not in the table"
    said = f"{about.name}, compute capability {about.major}.{about.minor}, {rate}"
    return f"{said}, {free / GIB:.1f} GiB free of {whole / GIB:.1f} GiB"


def peers(count: int) -> str:
    import torch

    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    without = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    return Note(f"none between {', '.join(without)}: NCCL goes through the host") if without else "between all"


# ---------------------------------------------------------------------- what a step computes with


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


# ---------------------------------------------------------------------- several processes


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
    return rows | {"srun": lambda: shutil.which("srun") or "not found"}


def operators(config: Config) -> dict[str, Ask]:
    """DeepSpeed's, which it compiles when one is first used."""

    from deepspeed.git_version_info import installed_ops as compiled
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    def state(name: str) -> str:
        if compiled.get(name):
            return "compiled"
        return "can be compiled" if ALL_OPS[name].is_compatible(verbose=False) else "cannot be compiled here"

    def tool(name: str) -> str:
        return shutil.which(name) or "not found"

    rows: dict[str, Ask] = {name: partial(tool, name) for name in ("ninja", "c++")}
    return rows | {name: partial(state, name) for name in sorted(ALL_OPS)}


# ---------------------------------------------------------------------- where results go


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


def disk(config: Config) -> dict[str, Ask]:
    def space(folder: Callable[[], Path], little: int) -> str:
        wanted = folder().expanduser().absolute()
        there = next(one for one in (wanted, *wanted.parents) if one.exists())
        used = shutil.disk_usage(there)
        says = f"{wanted}: {used.free / GIB:.1f} GiB free of {used.total / GIB:.1f} GiB"
        if not os.access(there, os.W_OK):
            return Note(f"{says}; cannot be written to")
        return Note(f"{says}; little") if used.free < little else says

    def hub() -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE)

    features = config.trainer.feature_cache_dir
    rows: dict[str, Ask] = {
        "runs_dir": partial(space, lambda: Path(config.runs_dir), LITTLE_DISK),
        "this project's cache": partial(space, cache_dir, LITTLE_DISK),
        "Hugging Face's cache": partial(space, hub, LITTLE_DISK),
        "shared memory": partial(space, lambda: Path("/dev/shm"), LITTLE_SHARED),
    }
    if features is not None:
        rows["feature cache"] = partial(space, lambda: Path(features), LITTLE_DISK)
    return rows


def limits(config: Config) -> dict[str, Ask]:
    def files() -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        says = f"{soft:,}, may be raised to {hard:,}"
        return Note(f"{says}; ulimit -n {min(hard, 65536)} for many loader workers") if soft < FEW_FILES else says

    def variable(name: str) -> str:
        return os.environ.get(name, "not set")

    rows: dict[str, Ask] = {"open files": files}
    return rows | {name: partial(variable, name) for name in VARIABLES}


# ---------------------------------------------------------------------- does it work


def self_test(config: Config) -> dict[str, Ask]:
    """A step on every device in the precision that `auto` takes there, the processor's in fp32 first: the reference of
    the others."""
    import torch

    from mmprune_train.training.precision import Precision, choose_precision
    from mmprune_train.training.self_test import check_near, losses_of_steps

    exact = Precision(torch.float32, "the reference")
    tries = [(torch.device("cpu"), exact)]
    for kind in kinds(config):
        devices = [torch.device(kind)] if kind == "cpu" else []
        devices += [torch.device(kind, index) for index in range(torch.cuda.device_count())] if kind == "cuda" else []
        tries += [(device, choose_precision("auto", kind)) for device in devices]
    reference = cache(partial(losses_of_steps, torch.device("cpu"), exact))

    def step(device: torch.device, precision: Precision) -> str:
        if (device.type, precision.name) == ("cpu", "fp32"):
            return reference()[1]
        found, says = losses_of_steps(device, precision)
        check_near(found, reference()[0])
        return says

    return {f"{device}, {precision.name}": partial(step, device, precision) for device, precision in tries}


SECTIONS: dict[str, Callable[[Config], dict[str, Ask]]] = {
    "versions": versions,
    "processor": processor,
    "GPUs": gpus,
    "precision": precision,
    "attention": attention,
    "loss and adapters": losses,
    "strategies": strategies,
    "DeepSpeed's operators": operators,
    "loggers and accounts": loggers,
    "disk": disk,
    "limits and environment": limits,
    TEST: self_test,
}
"""In the order of the page; the self-test last."""
