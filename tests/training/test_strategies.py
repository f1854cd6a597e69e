"""Strategies by name, and networks whose weights come from another process."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.synthetic import overrides

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import STRATEGIES
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin
from mmprune_train.model.build import load_model
from mmprune_train.model.llava import PackedLlava
from mmprune_train.training.network import make_trainable
from mmprune_train.training.precision import Precision
from mmprune_train.training.sharding import replace_tensors, shards_weights, undo
from mmprune_train.training.strategies import build_strategy
from mmprune_train.training.zero import ZeroStrategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_name_is_a_strategy_and_those_that_split_weights_say_so(name: str) -> None:
    strategy = build_strategy(name, "cpu", batch_size=3)
    assert shards_weights(strategy) == (name == "fsdp2" or "zero3" in name)
    if name.startswith("deepspeed"):
        zero = strategy.config["zero_optimization"]
        assert zero["stage"] == int(name.split("_")[1][-1])
        offloaded = [key for key in ("offload_optimizer", "offload_param") if zero.get(key)]
        wanted = {"deepspeed_zero2_offload": 1, "deepspeed_zero3_offload": 2}.get(name, 0)
        assert len(offloaded) == wanted and all(zero[key]["device"] == "cpu" for key in offloaded)


def test_one_process_cannot_be_several(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"single runs one process.*strategy=ddp.*fsdp2.*deepspeed_zero3_offload"):
        compose_config([*overrides(tmp_path, tmp_path), "trainer.devices=2"])


def test_offloaded_state_beside_a_gpu_is_for_deepspeeds_adam_where_that_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    class Compiled(torch.optim.SGD):
        def __init__(self, groups: object, adamw_mode: bool, **settings: object) -> None:
            made.append((adamw_mode, settings))
            super().__init__(groups, lr=0.1)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand more")

    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1}]
    gpu = ZeroStrategy(2, offload=True, batch_size=1, on_cpu=False, process_group_backend=None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed.ops.adam", SimpleNamespace(DeepSpeedCPUAdam=Compiled))
        assert isinstance(gpu.adam(groups, eps=1e-6), Compiled) and made == [(True, {"eps": 1e-6})]
        patch.setitem(sys.modules, "deepspeed.ops.adam", SimpleNamespace(DeepSpeedCPUAdam=broken))
        found = gpu.adam(groups, eps=1e-6)
    assert type(found) is torch.optim.AdamW and found.defaults["eps"] == 1e-6
    assert "DeepSpeed's faster CPU Adam does not work here (no compiler)" in capsys.readouterr().out
    here = ZeroStrategy(2, offload=True, batch_size=1, on_cpu=True, process_group_backend="gloo")
    assert type(here.adam(groups)) is torch.optim.AdamW


def test_tensors_that_modules_share_are_replaced_once_and_put_back() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    first.register_buffer("table", torch.zeros(1))
    both, own = nn.Sequential(first, second), first.weight
    before = replace_tensors(both, lambda tensor: tensor.detach() + 1)
    assert first.weight is second.weight is not own and first.weight.requires_grad and first.table == 1
    torch.testing.assert_close(first.weight.detach(), own.detach() + 1)
    undo(before)
    assert first.weight is second.weight is own and first.table == 0


def described(model: PackedLlava) -> dict[str, tuple]:
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in held}


@pytest.mark.parametrize(
    "chosen",
    [["peft=none", "llm.arch.tie_word_embeddings=true"], ["peft=lora"], ["peft=dora", "projector=linear"]],
    ids=" ".join,
)
def test_an_empty_network_is_the_same_without_memory(chosen: list[str], tmp_path: Path) -> None:
    config = compose_config([*overrides(tmp_path, tmp_path), *chosen])
    half = Precision(torch.bfloat16, "")
    whole, processor = begin(config)
    empty, _ = begin(config, empty=True)
    for model in (whole, empty):
        make_trainable(model, config, "instruct", half)
    assert described(empty) == described(whole)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    tied = config.llm.arch["tie_word_embeddings"]
    for model in (whole, empty):
        assert (model.hf.lm_head.weight is model.hf.model.language_model.embed_tokens.weight) == tied

    fresh, _ = begin(config)
    fresh.save(tmp_path / "model", processor)
    loaded, _ = load_model(tmp_path / "model")
    hollow, _ = load_model(tmp_path / "model", empty=True)
    assert described(hollow) == described(loaded) and all(p.is_meta for p in hollow.parameters())
