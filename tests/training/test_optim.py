"""What is trained, how fast, and on what schedule."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llava
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import PeftConfig, StageConfig
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters
from mmprune_train.pruning import Pruner
from mmprune_train.training.freezing import freeze, freezing_table
from mmprune_train.training.optim import parameter_groups, schedule


def model_of(vision: str = "clip") -> PackedLlava:
    return PackedLlava(tiny_llava(vision), Pruner(load_pruner("none")))


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 33, 100])
def test_schedule_equals_transformers(name: str, steps: int) -> None:
    make = get_cosine_schedule_with_warmup if name == "cosine" else get_linear_schedule_with_warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(optimizer, -(-3 * steps // 100), steps)
    ours = schedule(name, steps, 0.03)
    for step in range(steps):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_only_the_stated_parts_are_trained() -> None:
    model = model_of()
    parts = {p.name: p for p in freeze(model, StageConfig(train_projector=True, projector_lr=1e-3), adapters=False)}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("multi_modal_projector" in name for name in trained)
    assert parts["vision"].lr is None and parts["llm"].trainable == 0 and parts["projector"].lr == 1e-3
    assert not model.hf.model.vision_tower.training and model.hf.model.language_model.training


def test_with_adapters_the_llm_itself_stays_frozen() -> None:
    model = model_of()
    add_adapters(model, PeftConfig(name="lora", r=2, alpha=4, dropout=0.0))
    freeze(model, StageConfig(train_projector=False, train_llm=True), adapters=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_a_linear_projector_trains_its_one_layer() -> None:
    """Its second layer is the identity that makes it linear in Hugging Face's two-layer module."""
    model = model_of()
    model.hf.config.projector_hidden_act = "linear"
    freeze(model, StageConfig(train_projector=True), adapters=False)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("linear_1" in name for name in trained)


@pytest.mark.parametrize("vision", ["clip", "dinov2", "siglip"])
def test_every_trained_vision_weight_gets_a_gradient(vision: str) -> None:
    """Weights past the feature layer get none, which data parallelism would take for a fault."""
    model = model_of(vision)
    freeze(model, StageConfig(train_projector=False, train_vision=True), adapters=False)
    side = model.config.vision_config.image_size
    model.kept_features(torch.randn(1, 3, side, side)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_groups_have_their_rates_and_spare_norms_and_biases_from_decay() -> None:
    model = model_of()
    stage = StageConfig(train_projector=True, train_llm=True, lr=2e-5, projector_lr=1e-3)
    groups = parameter_groups(model, freeze(model, stage, adapters=False), weight_decay=0.1)
    by_name = {group["name"]: group for group in groups}
    assert by_name["projector"]["lr"] == 1e-3 and by_name["llm"]["lr"] == 2e-5
    assert all(p.dim() >= 2 for p in by_name["llm"]["params"]) and by_name["llm"]["weight_decay"] == 0.1
    assert by_name["llm (no decay)"]["weight_decay"] == 0 and by_name["projector (no decay)"]["weight_decay"] == 0
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in model.parameters())
    assert groups[-1]["name"].startswith("llm"), "the logged learning rate is the last group's"


def test_table_adds_up() -> None:
    model = model_of()
    text = freezing_table(freeze(model, StageConfig(), adapters=False), "title")
    total = sum(p.numel() for p in model.parameters())
    assert text.splitlines()[-1].split()[:2] == ["total", f"{total:,}"]
