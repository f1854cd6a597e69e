"""What accelerators can do, as their data sheets say: memory and dense bf16 matrix throughput."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from mmprune_train.errors import UserError, unknown_name

GIB = 2**30


@dataclass(frozen=True)
class Device:
    name: str
    memory_bytes: int
    """What a process can allocate, as the driver reports it: a little less than the name says."""
    tflops: float | None
    """Dense matrix products, 1e12 FLOPs a second, in bf16 with fp32 accumulation; None: not known."""


def _device(name: str, gib: float, tflops: float) -> Device:
    return Device(name, round(gib * GIB), tflops)


DEVICES = {
    device.name: device
    for device in (
        _device("b200_180gb", 178.4, 2250.0),
        _device("h200_141gb", 139.8, 989.5),
        _device("h100_80gb", 79.1, 989.5),
        _device("h100_pcie_80gb", 79.1, 756.0),
        _device("h100_nvl_94gb", 93.1, 835.0),
        _device("a100_80gb", 79.2, 312.0),
        _device("a100_40gb", 39.4, 312.0),
        _device("l40s_48gb", 44.4, 362.0),
        _device("rtx_a6000_48gb", 47.4, 154.8),
        _device("rtx4090_24gb", 23.6, 165.2),
        _device("rtx3090_24gb", 23.6, 71.0),
        _device("l4_24gb", 22.0, 121.0),
        _device("a10_24gb", 22.0, 125.0),
    )
}
"""By the name that `plan.device` takes. Throughput is the data sheets' without sparsity, of the SXM form where a name
does not say another."""
CPU = "cpu"

_PATTERNS = {
    r"\bB200\b": "b200_180gb",
    r"\bH200\b(?! NVL)": "h200_141gb",
    r"\bH100 PCIe\b": "h100_pcie_80gb",
    r"\bH100 NVL\b": "h100_nvl_94gb",
    r"\bH100\b.*80GB": "h100_80gb",
    r"\bA100\b.*80GB": "a100_80gb",
    r"\bA100\b.*40GB": "a100_40gb",
    r"\bL40S\b": "l40s_48gb",
    r"\bRTX A6000\b": "rtx_a6000_48gb",
    r"\bRTX 4090\b(?!.*(Laptop| D\b))": "rtx4090_24gb",
    r"\bRTX 3090\b(?! Ti)": "rtx3090_24gb",
    r"\bL4\b": "l4_24gb",
    r"\bA10\b": "a10_24gb",
}
"""What `torch.cuda.get_device_name` says -> a name of `DEVICES`."""


def known_device(name: str) -> Device | None:
    """The device of a name of `DEVICES`, or of a name that torch gives; None: it is not in the table."""
    if name in DEVICES:
        return DEVICES[name]
    return next((DEVICES[known] for pattern, known in _PATTERNS.items() if re.search(pattern, name)), None)


def device_peak(name: str) -> Device:
    """The device of a name of `DEVICES`, `cpu` for this machine's processor, whose throughput must be measured, or of a
    name that torch gives.

    Raises UserError where the table does not have it.
    """
    if name == CPU:
        return Device(CPU, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
    device = known_device(name)
    if device is None:
        raise UserError(unknown_name("plan.device", name, (*DEVICES, CPU)))
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
