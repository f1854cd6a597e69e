"""What accelerators can do, as their data sheets say: memory and dense bf16 matrix throughput."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    name: str
    memory_bytes: int
    """What a process can allocate, as the driver reports it: a little less than the name says."""
    tflops: float | None
    """Dense matrix products, 1e12 FLOPs a second, in bf16 with fp32 accumulation; None: not known."""


_TABLE = {
    "b200_180gb": (r"\bB200\b", 178.4, 2250.0),
    "h200_141gb": (r"\bH200\b(?! NVL)", 139.8, 989.5),
    "h100_80gb": (r"\bH100\b(?! PCIe| NVL).*80GB", 79.1, 989.5),
    "h100_pcie_80gb": (r"\bH100 PCIe\b", 79.1, 756.0),
    "h100_nvl_94gb": (r"\bH100 NVL\b", 93.1, 835.0),
    "a100_80gb": (r"\bA100\b.*80GB", 79.2, 312.0),
    "a100_40gb": (r"\bA100\b.*40GB", 39.4, 312.0),
    "l40s_48gb": (r"\bL40S\b", 44.4, 362.0),
    "rtx_a6000_48gb": (r"\bRTX A6000\b", 47.4, 154.8),
    "rtx4090_24gb": (r"\bRTX 4090\b(?!.*(Laptop| D\b))", 23.6, 165.2),
    "rtx3090_24gb": (r"\bRTX 3090\b(?! Ti)", 23.6, 71.0),
    "l4_24gb": (r"\bL4\b", 22.0, 121.0),
    "a10_24gb": (r"\bA10\b", 22.0, 125.0),
}
"""By the name that `plan.device` takes: what `torch.cuda.get_device_name` says, GiB, TFLOP/s. Throughput is the data
sheets' without sparsity, of the SXM form where a name does not say another."""
DEVICES = {name: Device(name, round(gib * GIB), tflops) for name, (_, gib, tflops) in _TABLE.items()}
CPU = "cpu"


def known_device(name: str) -> Device | None:
    """The device of a name of `DEVICES`, or of a name that torch gives; None: it is not in the table."""
    if name in DEVICES:
        return DEVICES[name]
    return next((DEVICES[known] for known, (pattern, *_) in _TABLE.items() if re.search(pattern, name)), None)


def device_peak(name: str) -> Device:
    """The device of a name of `DEVICES`, `cpu` for this machine's processor, whose throughput must be measured, or of a
    name that torch gives and the table has."""
    if name == CPU:
        return Device(CPU, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
    device = known_device(name)
    assert device is not None, name
    return device


def present_device() -> Device | None:
    """The GPU of this process with the memory it really has, `tflops` None where the table does not know it; None
    where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = known_device(name)
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Device(known.name if known else name, memory, known.tflops if known else None)
