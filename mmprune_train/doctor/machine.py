"""What this machine is and has: rows of `task=doctor`, a function a section.

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
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mmprune_train.config.schema import Config
from mmprune_train.devices import GIB, known_device
from mmprune_train.storage.assets import cache_dir
from mmprune_train.threads import OWN

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "mmprune_train"
FEW_FILES = 4096
"""Open files below which many loader workers run out of them. Our choice, like the two that follow."""
LITTLE_SHARED = 1 * GIB
LITTLE_DISK = 10 * GIB
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "HF_HUB_OFFLINE", "WANDB_MODE",
)  # fmt: skip
"""What is shown of the environment: nothing else, since anything else may be a secret."""


class Note(str):
    """What a row says, where it wants attention."""


Ask = Callable[[], str]
"""Finds what a row says, or raises."""


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

        if any(name in os.environ for name in OWN) or torch.get_num_threads() == 1:
            return f"{torch.get_num_threads()}"
        return Note(f"{torch.get_num_threads()}; GOMP_SPINCOUNT=2000 keeps them from spinning for long")

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
        "compiler (nvcc)": partial(tool, "nvcc", "not found; FlashAttention and DeepSpeed's operators need it"),
    }
    rows |= {f"cuda:{index}": partial(gpu, index) for index in range(count)}
    if count > 1:
        rows["peer access"] = partial(peers, count)
    return rows


def tool(name: str, otherwise: str = "not found") -> str:
    return shutil.which(name) or otherwise


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
    return {
        "runs_dir": partial(space, lambda: Path(config.runs_dir), LITTLE_DISK),
        "this project's cache": partial(space, cache_dir, LITTLE_DISK),
        "Hugging Face's cache": partial(space, hub, LITTLE_DISK),
        "shared memory": partial(space, lambda: Path("/dev/shm"), LITTLE_SHARED),
        **({"feature cache": partial(space, lambda: Path(features), LITTLE_DISK)} if features is not None else {}),
    }


def limits(config: Config) -> dict[str, Ask]:
    def files() -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        says = f"{soft:,}, may be raised to {hard:,}"
        return Note(f"{says}; ulimit -n {min(hard, 65536)} for many loader workers") if soft < FEW_FILES else says

    def variable(name: str) -> str:
        return os.environ.get(name, "not set")

    return {"open files": files, **{name: partial(variable, name) for name in VARIABLES}}
