"""Precision and accelerator."""

from __future__ import annotations

import pytest
import torch

from mmprune_train.errors import UserError
from mmprune_train.training import precision


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_only_where_the_hardware_computes_in_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "hardware_bf16", lambda accelerator: (native, "because"))
    chosen = precision.choose_precision("auto", "cpu")
    assert chosen.dtype == (torch.bfloat16 if native else torch.float32)
    assert chosen.lightning == ("bf16-mixed" if native else "32-true") and chosen.reason == "because"


def test_a_setting_wins_over_the_hardware() -> None:
    assert precision.choose_precision("bf16", "cpu").name == "bf16"
    assert precision.choose_precision("fp32", "cuda").name == "fp32"


def test_cuda_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.choose_accelerator("auto") == "cpu"
    with pytest.raises(UserError, match="trainer.accelerator"):
        precision.choose_accelerator("cuda")
