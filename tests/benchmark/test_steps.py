"""What `task=bench` measures of training steps and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import packed, tiny_llava
from torch import nn
from training.short import Loader, sample
from training.synthetic import overrides, write_dataset

from mmprune_train.benchmark.baseline import as_transformers, padded_inputs
from mmprune_train.benchmark.counters import flop_counter
from mmprune_train.benchmark.lengths import lengths_cost
from mmprune_train.benchmark.steps import BASELINE, PARTS, padded, pruned, step_costs, timed_module
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.data.batch import collate
from mmprune_train.errors import UserError
from mmprune_train.model.execution import Clock, Execution
from mmprune_train.model.llava import PackedLlava
from mmprune_train.tasks import bench


def test_the_padded_baseline_has_the_packed_models_loss() -> None:
    model = packed(tiny_llava(), "none")
    batch = next(Loader(6).epoch(0, 0))
    ours = model.forward_packed(batch.sequence, batch.pixel_values)
    inputs = padded_inputs(batch)
    assert (inputs["attention_mask"] == 0).any(), "nothing is padded"
    with as_transformers(model):
        theirs = model.hf(**inputs).loss
    torch.testing.assert_close(ours.loss_sum / ours.supervised, theirs)
    again = model.forward_packed(batch.sequence, batch.pixel_values)
    assert torch.equal(again.loss_sum, ours.loss_sum), "the packed attention is not back"


def test_attention_counts_in_the_cpus_kernel_as_in_a_plain_product() -> None:
    query = torch.randn(2, 4, 9, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(2))
    with flop_counter() as forward:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    with flop_counter() as backward:
        out.sum().backward()
    product = 2 * 2 * 4 * 9 * 9 * 8  # of scores, or of states: multiply and add, batch, heads, L x L, width
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product  # scores once more, and two products each for two operands


def test_a_module_is_timed_call_by_call() -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock, linear = Clock(lambda: next(now)), nn.Linear(2, 2)
    with clock.part("rest"), timed_module(linear, clock, "linear"):  # 0
        linear(torch.ones(2))  # 1 .. 3
        linear(torch.ones(2))  # 6 .. 10
    assert clock.lap() == {"rest": 1 + 3 + 5, "linear": 2 + 4}
    linear(torch.ones(2))
    assert clock.lap() == {}


def test_steps_are_told_apart_and_leave_the_model_as_it_was() -> None:
    model = packed(tiny_llava(), "twostage")
    model.train()
    model.hf.model.vision_tower.requires_grad_(False)  # the backward pass is the LLM's
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = model.pruner
    batch = next(Loader(6).epoch(0, 0))
    ways = {
        BASELINE: padded(model, batch),
        "none": pruned(model, batch, load_pruner("none")),
        "twostage": pruned(model, batch, load_pruner("twostage")),
    }
    costs = step_costs(model, ways, repeats=2, dtype=torch.float32)
    assert model.pruner is pruner and model.execution == Execution()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, cost in costs.items():
        assert list(cost.seconds) == [*PARTS, "step"]
        assert all(len(times) == 2 for times in cost.seconds_all.values())
        assert sum(cost.seconds_all[part][0] for part in PARTS) == pytest.approx(cost.seconds_all["step"][0])
        assert cost.seconds["vision"] > 0 and cost.seconds["backward"] > 0 and cost.peak_bytes > 0
        assert (cost.seconds["selection"] > 0) == (name != BASELINE)
    assert costs[BASELINE].keep_ratio > costs["none"].keep_ratio == 1 > costs["twostage"].keep_ratio
    assert costs[BASELINE].tokens["padding"] > costs["none"].tokens["padding"] == 0
    assert costs[BASELINE].language_flops > costs["none"].language_flops > costs["twostage"].language_flops
    assert costs["none"].peak_bytes > costs["twostage"].peak_bytes
    whole, short = costs["none"].causal_flops, costs["twostage"].causal_flops
    assert costs[BASELINE].causal_flops is None and whole is not None and short is not None
    assert costs["none"].language_flops > whole > short, "half of causal attention is not computed"
    assert short / whole > costs["twostage"].language_flops / costs["none"].language_flops
    assert costs["none"].flops["vision"] == pytest.approx(_tower_flops(model, batch.pixel_values))
    assert costs["twostage"].flops["selection"] > 0 == costs["none"].flops["selection"]
    assert costs[BASELINE].flops["vision"] > costs["none"].flops["vision"], "transformers stops at the feature layer"
    for cost in costs.values():
        assert sum(cost.flops[part] for part in PARTS) == cost.flops["step"]


def test_steps_on_other_lengths_stand_beside_as_many_on_the_one_of_mean_length() -> None:
    model, seen = packed(tiny_llava(), "none"), []
    model.train()
    before = model.hf.lm_head.weight.clone()
    batches = [collate([sample(number) for number in numbers]) for numbers in ([3], [1], [1, 2, 3], [0], [2])]
    warm, *ways = (pruned(model, batch, load_pruner("none")) for batch in batches)
    model.hf.model.language_model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    cost = lengths_cost(model, warm, ways, torch.float32)
    assert cost.tokens == [18, 63, 15, 21] and cost.repeated == 3, "the mean is 29.25"
    assert seen == [24, 18, 63, 15, 21, *[21] * 4]
    assert cost.ratio == sum(cost.seconds) / sum(cost.repeated_seconds) > 0 < cost.cpu_ratio
    assert model.execution == Execution() and torch.equal(model.hf.lm_head.weight, before)


def _tower_flops(model: PackedLlava, pixels: Any) -> float:
    """Products of the tower's matrices with its states, up to the feature layer, and of its attention."""
    tower = model.hf.model.vision_tower
    blocks = tower.encoder.layers[: len(tower.encoder.layers) + 1 + model.config.vision_feature_layer]
    size, side = tower.config.patch_size, tower.config.image_size
    tokens, width, images = (side // size) ** 2 + 1, tower.config.hidden_size, len(pixels)
    weights = sum(part.weight.numel() for block in blocks for part in block.modules() if isinstance(part, nn.Linear))
    embed = 2 * 3 * size**2 * width * (tokens - 1)
    return images * (embed + 2 * tokens * weights + len(blocks) * 4 * tokens**2 * width)


def test_an_unknown_pruner_is_named_with_its_key_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench\.pruners: pruner=twostag: .*twostage"):
        bench.run(compose_config([*overrides(tmp_path / "nothing", tmp_path), "bench.pruners=[none,twostag]"]))


def test_the_task_writes_tables_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_dataset(tmp_path / "squares")
    more = ["task=bench", "bench.batch_size=3", "bench.repeats=1", "bench.pruners=[none,fastervlm]", "bench.images=5"]
    more += ["bench.measure=[train,generate,selection,lengths]", "bench.new_tokens=3", "bench.batches=2"]
    result = bench.run(compose_config([*overrides(root, tmp_path / "runs"), *more]))
    folder = tmp_path / "runs/smoke/t/bench"
    assert result == json.loads((folder / "result.json").read_text())
    assert (folder / "bench.png").stat().st_size > 10_000
    assert result["samples"] == 3
    ways = ["none", "fastervlm", "none + cache", "fastervlm + cache"]
    assert list(result["train"]) == [BASELINE, *ways]
    for name in ways[2:]:
        cached, own = result["train"][name], result["train"][name.removesuffix(" + cache")]
        assert cached["tokens"] == own["tokens"]
        assert cached["flops"]["vision"] == 0 < own["flops"]["vision"]
        assert cached["flops"]["backward"] == own["flops"]["backward"] > 0
    assert not (folder / "features").exists()
    assert list(result["generate"]) == [BASELINE, "none", "fastervlm"]
    assert result["generate"][BASELINE]["cache_bytes"] >= result["generate"]["none"]["cache_bytes"] > 0
    assert result["selection"]["images"] == 5 and list(result["selection"]["pruners"]) == ["none", "fastervlm"]
    assert list(result["lengths"]) == ["none + cache", "fastervlm + cache"]
    assert [len(cost["seconds"]) for cost in result["lengths"].values()] == [2, 2]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("fastervlm", "causal ideal", "first token s", "CPU ratio"))
