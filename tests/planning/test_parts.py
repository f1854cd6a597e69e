"""The parts of a plan: token counts, samples, devices, layouts, remedies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PATCHES, packed, tiny_inputs, tiny_llava
from training.short import sample
from training.synthetic import overrides, write_dataset

from mmprune_train import devices
from mmprune_train.benchmark.counters import peak_memory
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import STRATEGIES
from mmprune_train.data.batch import collate
from mmprune_train.planning.layout import LAYOUTS, numerics, states
from mmprune_train.planning.lengths import count_tokens, data_dependent, solve_share
from mmprune_train.planning.remedies import first_that_fits
from mmprune_train.planning.samples import stage_samples
from mmprune_train.pruning import Kind

FIXED = {"method": "fixed_ratio", "ratio": 0.5}


@pytest.mark.parametrize(
    "pruner",
    [
        "none",
        "fastv",
        "pyramiddrop",
        {"name": "visionzip", "vision": {"knee": {"count": 3}, "merge_args": {"count": 2}}},
        {"name": "downsample", "vision": {"knee": {"count": 5}}},
        {"name": "mmtok", "vision": {"knee": {"count": 5}}},
        {"name": "twostage", "vision": {"knee": FIXED}, "language": {"knee": FIXED}},
        {"name": "sparsevlm", "language": {"per_layer_budgets": [6, 3, 2]}},
        {"name": "dart", "language": {"knee": {"count": 6}}},
        {"name": "pool", "language": {"knee": {"ratio": 0.34}}},
        {"name": "vscan", "vision": {"knee": {"count": 3}, "recover": {"knee": {"count": 2}}}},
    ],
    ids=str,
)
def test_counts_of_fixed_budgets_are_those_of_a_pass(pruner: object) -> None:
    model = packed(tiny_llava(), pruner)
    samples = [sample(number) for number in range(5)]
    batch = collate(samples)
    with torch.no_grad():
        trace = model.forward_packed(batch.sequence, batch.pixel_values).trace
    found = count_tokens(load_pruner(pruner), samples, PATCHES, 4, share=0.1)
    assert not data_dependent(load_pruner(pruner))
    assert torch.equal(found.lengths, torch.stack(trace.layers).double())
    assert torch.equal(found.dense, trace.dense.double()) and torch.equal(found.stage1, trace.stage1.double())
    assert found.kept_patches.sum() == sum(map(len, trace.vision_kept))
    assert found.keep_ratio == pytest.approx(trace.counts()["layer_mean"] / trace.counts()["dense"])


def test_a_budget_that_looks_at_images_gets_the_share_that_meets_the_ratio() -> None:
    pruner = load_pruner("twostage")
    samples = stage_samples(compose_config(["+experiment=llava7b_twostage"]), "instruct", 576, 64).samples
    share = solve_share(pruner, samples, 576, 32, keep=0.3)
    found = count_tokens(pruner, samples, 576, 32, share)
    assert found.visual_keep_ratio == pytest.approx(0.3, abs=0.01) and 0.22 < share < 1
    assert data_dependent(pruner) == ["pruner.vision.knee", "pruner.language.knee"]


def test_lengths_are_exact_where_files_and_tokenizer_are_and_say_so_where_not(tmp_path: Path) -> None:
    from mmprune_train.data.encode import encode
    from mmprune_train.data.records import read_annotations
    from mmprune_train.data.templates import get_template
    from mmprune_train.model.tokenizer import load_tokenizer

    root = write_dataset(tmp_path / "data")
    config = compose_config(overrides(root, tmp_path / "runs"))
    found = stage_samples(config, "instruct", 36, 100)
    tokenizer = load_tokenizer(None)
    template = get_template("v1", tokenizer)
    records = read_annotations(root / "instruct.json", root / "images").records
    wanted = {r.id: len(encode(r, template, tokenizer, 36, 1024).ids) for r in records}
    assert {s.example.id: len(s.example.ids) for s in found.samples} == wanted
    assert found.total == len(records) == 18 and found.images == 16 and "tokenised" in found.source
    assert len(stage_samples(config, "instruct", 36, 5).samples) == 5
    short = max(wanted.values()) - 1
    cut = stage_samples(
        compose_config([*overrides(root, tmp_path), f"stage.instruct.max_length={short}"]), "instruct", 36, 100
    )
    assert f"; max_length={short} cuts {sum(n > short for n in wanted.values())} of them" in cut.source
    assert "cuts" not in found.source

    elsewhere = replace(config, llm=replace(config.llm, path="nobody/nothing"))
    guessed = stage_samples(elsewhere, "instruct", 36, 100)
    assert "ESTIMATED" in guessed.source
    for one in guessed.samples:  # text of the small tokenizer is finer cut than English; images are exact
        assert (one.example.kind == Kind.VISUAL).sum() == 36 * len(one.images)

    few = compose_config([*overrides(root, tmp_path), "data.instruct.limit=9"])
    absent = replace(few, data=replace(few.data, root=str(tmp_path / "nowhere")))
    made = stage_samples(absent, "instruct", 36, 100)
    assert "ASSUMED" in made.source and made.total == 9


def test_devices_are_known_by_torchs_names() -> None:
    named = {
        "NVIDIA A100-SXM4-80GB": "a100_80gb",
        "NVIDIA A100 80GB PCIe": "a100_80gb",
        "NVIDIA A100-PCIE-40GB": "a100_40gb",
        "NVIDIA H100 80GB HBM3": "h100_80gb",
        "NVIDIA H100 PCIe": "h100_pcie_80gb",
        "NVIDIA H100 NVL": "h100_nvl_94gb",
        "NVIDIA H200": "h200_141gb",
        "NVIDIA B200": "b200_180gb",
        "NVIDIA L40S": "l40s_48gb",
        "NVIDIA L4": "l4_24gb",
        "NVIDIA A10": "a10_24gb",
        "NVIDIA GeForce RTX 4090": "rtx4090_24gb",
        "NVIDIA RTX A6000": "rtx_a6000_48gb",
        "NVIDIA GeForce RTX 3090": "rtx3090_24gb",
    }
    for torchs, ours in named.items():
        assert devices.device_peak(torchs).name == ours == devices.device_peak(ours).name
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "NVIDIA L40", "Tesla T4"):
        assert devices.known_device(other) is None
    assert devices.device_peak("cpu").memory_bytes > 1e9


def test_zero_spreads_what_its_stage_says() -> None:
    assert set(LAYOUTS) == set(STRATEGIES)
    model = torch.nn.Linear(1000, 1000, bias=False)  # a million parameters
    frozen = torch.nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    both = [model.weight, frozen.weight]
    found = {}
    for name, layout in LAYOUTS.items():
        kept = states(layout, both, numerics(layout, torch.bfloat16), 4, cuda=True)
        found[name] = [round(value / 1e6, 6) for value in (kept.weights, kept.gradients, kept.optimizer, kept.host)]
    assert found == {
        "single": [2 + 4, 4, 8, 0],
        "ddp": [2 + 4, 4, 8, 0],
        "deepspeed_zero1": [4, 2, 12 / 4, 0],
        "deepspeed_zero2": [4, 2 / 4, 12 / 4, 0],
        "deepspeed_zero3": [4 / 4, 2 / 4, 12 / 4, 0],
        "fsdp2": [(2 + 4) / 4, 4 / 4, 8 / 4, 0],
        "deepspeed_zero2_offload": [4, 0, 0, 16 / 4],
        "deepspeed_zero3_offload": [0, 0, 0, 16 / 4 + 4 / 4],
    }
    layout = LAYOUTS["fsdp2"]
    how = numerics(layout, torch.bfloat16)
    gathered = states(layout, both, how, 4, cuda=True, gathered=both).working
    assert gathered == frozen.weight.numel() * 2 + model.weight.numel() * (2 + 2 + 4)


def test_the_first_change_that_fits_is_named() -> None:
    config = compose_config(["+experiment=llava7b_dense", "stage.instruct.gradient_checkpointing=false"])
    config = replace(config, strategy=replace(config.strategy, name="ddp"))
    tried: list[tuple] = []

    def memory(changed: object) -> float:
        stage = changed.stage["instruct"]
        seen = (stage.gradient_checkpointing, stage.batch_size, stage.strategy, changed.peft.name)
        tried.append(seen)
        return 0 if seen[2] == "deepspeed_zero3" and seen[1] == 8 else 2

    assert first_that_fits(config, "instruct", memory, 1) == [
        "stage.instruct.gradient_checkpointing=true",
        "stage.instruct.strategy=deepspeed_zero3",
        "stage.instruct.batch_size=8",
    ]
    assert tried[0] == (True, 16, None, "none") and tried[1] == (True, 8, None, "none")
    assert first_that_fits(config, "instruct", lambda changed: 0 if changed.peft.name == "lora" else 2, 1)[-1:] == [
        "peft=lora"
    ]
    assert first_that_fits(config, "instruct", lambda _: 2, 1) is None
    assert first_that_fits(config, "instruct", lambda changed: 0 if changed.peft.name == "qlora" else 2, 1) == [
        "stage.instruct.gradient_checkpointing=true",
        "stage.instruct.strategy=deepspeed_zero2",  # ZeRO-3 would spread the 4-bit weights
        "peft=qlora",
    ]
    tried.clear()
    assert first_that_fits(config, "instruct", lambda c: 2 * bool(memory(c)), 1, gpu=False) is not None
    assert first_that_fits(config, "instruct", lambda c: 2 + memory(c), 1, gpu=False) is None
    assert {kind for *_, kind in tried} == {"none", "lora"} and not any("offload" in str(seen[2]) for seen in tried)


def test_offloading_is_named_last_and_trains_what_the_stage_does() -> None:
    config = compose_config(["+experiment=llava7b_twostage_lora", "trainer.devices=1", "strategy=single"])
    tried: list[tuple] = []

    def memory(changed: object) -> float:
        stage = changed.stage["instruct"]
        tried.append((changed.peft.name, stage.strategy))
        return 0 if stage.strategy == "deepspeed_zero3_offload" else 2

    said = first_that_fits(config, "instruct", memory, 1)
    assert said == ["stage.instruct.strategy=deepspeed_zero3_offload"] and "qlora" not in said
    kinds = list(dict.fromkeys(tried))
    assert kinds == [
        ("lora", None), ("qlora", None), ("lora", "deepspeed_zero2_offload"), ("lora", "deepspeed_zero3_offload")
    ]  # fmt: skip
    compose_config(["+experiment=llava7b_twostage_lora", *said])


def test_what_is_named_is_understood() -> None:
    asked = ["+experiment=llava7b_dense", "strategy=ddp"]
    config = compose_config(asked)
    for enough in (
        lambda changed: changed.stage["instruct"].strategy == "deepspeed_zero3",
        lambda changed: changed.peft.name == "qlora",
        lambda changed: changed.stage["instruct"].strategy == "deepspeed_zero2_offload",
    ):
        said = first_that_fits(config, "instruct", lambda changed, enough=enough: 0 if enough(changed) else 2, 1)
        assert enough(compose_config([*asked, *said]))


def test_peak_memory_is_what_torchs_profiler_sees() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    states = torch.randn(100, 64)

    def step() -> None:
        layers(states).square().sum().backward()
        layers.zero_grad()

    with peak_memory("cpu") as peak:
        step()
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    assert peak.bytes == highest > 100 * 256 * 4


def test_views_and_writes_in_place_are_no_memory() -> None:
    inputs = tiny_inputs([1], [5])["input_ids"].float()
    with peak_memory("cpu") as peak:
        inputs.view(-1)[1:].add_(1)
        inputs.t()
    assert peak.bytes == 0
    with peak_memory("cpu") as peak:
        for _ in range(3):
            torch.empty(1000)
    assert peak.bytes == 4000
