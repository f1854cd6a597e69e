"""How often a training step waits for the device, counted on a pretended one."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from loaded import LANGUAGE_SCORES, SELECTIONS, VISION_SCORES
from model.test_every_pruner import sample
from pretend import PretendedDevice, move, on_device
from tiny import packed, tiny_llava
from torch import Tensor

from mmprune_train.config.schema import OptimConfig, StageConfig
from mmprune_train.data.batch import Batch, Place, collate
from mmprune_train.errors import UserError
from mmprune_train.model.llava import PackedLlava
from mmprune_train.packed.host import fetch, take, upload
from mmprune_train.pruning import available_budgets, language_scores, vision_scores
from mmprune_train.storage.conf import options
from mmprune_train.training.freezing import freeze
from mmprune_train.training.module import MultimodalModule

MORE = {
    "recoverable": 3,  # its budget, its second pass and its merge each run scikit-learn's LOF on the host
    "sparsevlm": 1,  # which question tokens vote, before the layers
    "dart": 1,  # its pivots, whose order is that of a Python set
}
"""Fetches of a preset beyond one for each stage-1 pass and each layer that stage 2 prunes before."""
CONVERSATIONS = [[(1, 5, 3)], [(2, 4, 2), (0, 3, 1)], [(0, 3, 2)], [(1, 0, 2)]]


def batch(conversations: list = CONVERSATIONS) -> Batch:
    return collate([sample(number, turns) for number, turns in enumerate(conversations)])


def stages(model: PackedLlava) -> int:
    """Pruning stages of a pass in which every one has something to drop."""
    return int(model.pruner.settings.vision.enabled) + len(model.pruner.layers(4))


def step(settings: object, given: Batch, vision: str = "clip") -> tuple[PretendedDevice, PackedLlava]:
    """A training pass forwards and backwards, which must come to what it comes to on the host."""
    model = packed(tiny_llava(vision), settings).train()
    torch.manual_seed(0)
    expected = model.forward_packed(given.sequence, given.pixel_values)
    expected.loss_sum.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    move(model)
    model.zero_grad()
    torch.manual_seed(0)
    with PretendedDevice() as device:
        output = model.forward_packed(
            given.sequence, None if given.pixel_values is None else on_device(given.pixel_values)
        )
        output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum.stored, expected.loss_sum)
    assert torch.equal(output.sequence.slot, expected.sequence.slot) and len(gradients) > 10
    for name, parameter in model.named_parameters():
        if name in gradients:
            largest = max(1.0, float(gradients[name].abs().max()))
            torch.testing.assert_close(parameter.grad.stored, gradients[name], rtol=1e-4, atol=1e-4 * largest)
    return device, model


@pytest.mark.parametrize("name", options("pruner"))
def test_a_step_waits_once_for_each_pruning_stage(name: str) -> None:
    device, model = step(name, batch())
    assert not device.waits
    assert len(device.fetches) == stages(model) + MORE.get(name, 0), device.fetches


def test_a_batch_without_images_waits_for_the_blank_one_alone() -> None:
    device, _ = step("twostage", batch([[(0, 3, 2)], [(0, 4, 1)]]))
    assert not device.waits and len(device.fetches) == 1


@pytest.mark.parametrize("name", available_budgets())
def test_budgets_count_on_the_device(name: str) -> None:
    pruner = "learned" if name == "above_zero" else "twostage"
    device, model = step(
        {"name": pruner, **{part: {"knee": {"method": name}} for part in ("vision", "language")}}, batch()
    )
    assert len(device.fetches) == stages(model) * (2 if name == "lof" else 1), device.fetches
    spectrum = stages(model) if name == "effective_rank" else 0  # eigenvalues
    assert len(device.waits) == spectrum, device.waits


LOOPING = ("max_min", "dpp", "top_and_distinct", "weighed_coverage", "question_coverage")


@pytest.mark.parametrize("knee", ["kneedle", "fixed_ratio", "fixed_count"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_that_loop_wait_for_counts_that_the_budget_does_not_know(name: str, knee: str) -> None:
    budget = {"method": knee, "count": 4, "ratio": 0.4}
    device, model = step({"name": "encoder_only", "vision": {"selection": name, "knee": budget}}, batch())
    loops = knee == "kneedle" and name in LOOPING
    assert not device.waits and len(device.fetches) == stages(model) + loops, device.fetches


@pytest.mark.parametrize("name", VISION_SCORES)
def test_stage_one_scores_do_not_wait(name: str) -> None:
    vision = "siglip" if name == "map_attention" else "clip"
    device, _ = step({"name": "encoder_only", "vision": {"score": name}}, batch(), vision)
    assert not device.waits and len(device.fetches) == 1, device.fetches


@pytest.mark.parametrize(
    ("name", "turns"),
    [*((score, "mean") for score in LANGUAGE_SCORES), ("text_attention", "first"), ("key_norm", "max")],
)
def test_stage_two_scores_do_not_wait(name: str, turns: str) -> None:
    language = {"score": name, "turns": turns, "layer": [1, 3], "no_text": "last_token_attention", "merge": "recycle"}
    device, _ = step({"name": "language_only", "language": language}, batch())
    assert not device.waits and len(device.fetches) == 2, device.fetches


def test_rotary_tables_are_made_once_for_each_run_of_layers() -> None:
    model = packed(tiny_llava(), "pyramiddrop").train()
    made = []
    model.hf.model.language_model.rotary_emb.register_forward_hook(lambda *_: made.append(1))
    model.forward_packed(batch().sequence, batch().pixel_values)
    assert len(made) == 1 + stages(model) == 4


def test_the_loss_is_read_once_an_optimizer_step() -> None:
    model = packed(tiny_llava(), "twostage")
    parts = freeze(model, StageConfig(train_projector=True, train_llm=True, lr=1e-3), adapters=False)
    module = MultimodalModule("instruct", model, parts, OptimConfig(), total_steps=1, seed=0)
    strategy = SimpleNamespace(handles_gradient_accumulation=False)
    groups = [{"lr": 1e-3, "name": "llm"}]
    group = SimpleNamespace(param_groups=groups, zero_grad=lambda: None)
    module.trainer = SimpleNamespace(
        accumulate_grad_batches=3, world_size=1, global_rank=0, strategy=strategy, optimizers=[group]
    )
    given = batch()
    expected = float(model.train().forward_packed(given.sequence, given.pixel_values).loss_sum.detach())
    move(model)
    groups[0]["params"] = list(model.parameters())
    with PretendedDevice() as device:
        given.pixel_values = on_device(given.pixel_values)
        for index in range(3):
            given.place = Place(0, index, 3, 3 * given.supervised)
            module.on_train_batch_start(given, index)
            module.training_step(given, index).backward()
        assert not device.waits and len(device.fetches) == 3 * stages(model)
        module.on_before_optimizer_step(group)
        metrics = module.step_metrics()
    assert len(device.waits) == 1, "with the gradient norm"
    norms = torch.stack([p.grad.stored.norm() for p in groups[0]["params"] if p.grad is not None])
    assert metrics["grad_norm"] == pytest.approx(float(norms.norm()), rel=1e-5)
    assert metrics["loss"] == pytest.approx(expected / given.supervised, rel=1e-5)


@pytest.mark.parametrize(
    ("module", "function", "preset", "told"),
    [
        (vision_scores, "random_vision", {"name": "random", "language": {"enabled": False}}, "scores row 0 holds NaN"),
        (
            language_scores,
            "random_language",
            {"name": "random", "vision": {"enabled": False}},
            "scores row 0 holds NaN",
        ),
        (
            vision_scores,
            "random_vision",
            {
                "name": "encoder_only",
                "vision": {"merge": "contextual", "recover": {"enabled": True, "score": "random"}},
            },
            "pruner.vision.recover.score=random gave NaN",
        ),
    ],
)
def test_scores_that_cannot_be_ranked_are_found_with_what_stays(
    module: ModuleType, function: str, preset: dict, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = getattr(module, function), torch.tensor([3, 4, 5])
    monkeypatch.setattr(module, function, lambda view: good(view).index_fill(-1, bad, torch.nan))
    model = packed(tiny_llava(), preset).eval()  # in training the loss tells
    with pytest.raises(UserError, match=told):
        model.forward_packed(batch().sequence, batch().pixel_values)


def test_negative_scores_that_a_budget_shares_out_are_found_with_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_scores, "random_vision", lambda view: -torch.rand(view.patches.shape[:2]))
    preset = {"name": "random", "vision": {"knee": {"method": "attention_entropy"}}}
    with pytest.raises(UserError, match="attention_entropy: scores row 0 is negative"):
        packed(tiny_llava(), preset).forward_packed(batch().sequence, batch().pixel_values)


def _blocking(values: Tensor) -> object:
    return torch.arange(4).to(values.device)


@pytest.mark.parametrize(
    ("waits", "does"),
    [
        (1, lambda values: values[values > 0]),
        (1, lambda values: values.sum().item()),
        (1, lambda values: bool((values > 0).any())),
        (1, lambda values: values.tolist()),
        (1, lambda values: values.cpu()),
        (1, lambda values: (values > 0).nonzero()),
        (1, lambda values: values.long().unique()),
        (1, lambda values: values.long().bincount()),
        (1, lambda values: values.repeat_interleave(values.long())),
        (0, lambda values: values.repeat_interleave(values.long(), output_size=6)),
        (1, lambda values: values[torch.arange(2)]),
        (1, _blocking),
        (0, lambda values: values.masked_fill(values > 0, 1) + torch.arange(4, device=values.device)),
        (0, lambda values: values.__setitem__(values > 0, 0.0)),
        (0, lambda values: take(values, torch.arange(2)) + upload(torch.ones(2), values.device)),
    ],
)
def test_the_count_sees_what_waits(waits: int, does: object) -> None:
    with PretendedDevice() as device:
        does(on_device(torch.arange(4.0)))
    assert len(device.waits) == waits and not device.fetches


def test_host_and_device_do_not_mix_and_a_fetch_is_counted() -> None:
    with PretendedDevice() as device:
        values = on_device(torch.arange(4.0))
        with pytest.raises(AssertionError, match="meets host and device"):
            values + torch.arange(4)
        assert fetch(values).tolist() == [0, 1, 2, 3] and len(device.fetches) == 1 and not device.waits
