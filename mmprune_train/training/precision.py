"""bf16 where the hardware computes in it: elsewhere it is emulated, and slower than fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmprune_train.errors import UserError


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    reason: str
    """Why, for the line that is printed."""

    @property
    def lightning(self) -> str:
        """Name of the precision plugin: fp32 master weights in both cases."""
        return "bf16-mixed" if self.dtype == torch.bfloat16 else "32-true"

    @property
    def name(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def choose_accelerator(setting: str) -> str:
    """`auto`, `cpu` or `cuda` to `cpu` or `cuda`; UserError when CUDA is asked for and there is none."""
    present = torch.cuda.is_available()
    if setting == "cuda" and not present:
        raise UserError("trainer.accelerator=cuda: no CUDA device is visible here; use trainer.accelerator=auto or cpu")
    return "cuda" if present and setting != "cpu" else "cpu"


def hardware_bf16(accelerator: str) -> tuple[bool, str]:
    """Whether matrix products run natively in bf16, and what that is judged by."""
    if accelerator == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, "the GPU computes in bf16"
        return False, "the GPU has no bf16 units"
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "the CPU has AVX-512 BF16"
    return False, "the CPU has neither AMX nor AVX-512 BF16"


def choose_precision(setting: str, accelerator: str) -> Precision:
    """`auto`, `bf16` or `fp32` on `cpu` or `cuda`."""
    if setting == "auto":
        native, reason = hardware_bf16(accelerator)
        return Precision(torch.bfloat16 if native else torch.float32, reason)
    return Precision(torch.bfloat16 if setting == "bf16" else torch.float32, "as trainer.precision asks")
