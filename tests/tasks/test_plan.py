"""`task=plan` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmprune_train.config.compose import compose_config
from mmprune_train.config.identity import run_dir
from mmprune_train.storage.conf import options
from mmprune_train.tasks import plan
from mmprune_train.tasks.plan import run


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_plans(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"+experiment={experiment}", f"runs_dir={tmp_path}", "task=plan", "plan.samples=48"]
    if "7b" in experiment or "13b" in experiment:
        overrides += [f"data.root={tmp_path}", "peft.r=4"]
    config = compose_config([*overrides, "plan.device=a100_80gb"])
    result = run(config)
    assert json.loads((run_dir(config) / "plan" / "result.json").read_text()) == json.loads(json.dumps(result))
    said = capsys.readouterr().out
    for name in config.stages:
        stage = result["stages"][name]
        dense, pruned = stage["dense"], stage["pruned"]
        assert f"{name}, dense: fits: " in said and dense["fits"]
        assert sum(dense["memory_per_device"][k] for k in ("weights", "activations")) < 80e9
        assert dense["hours"] > 0 and dense["tokens"]["dense"]["p50"] > 36
        assert (pruned is None) == (config.pruner.name == "none")
        if pruned is not None:
            assert sum(pruned["flops_per_step"].values()) < sum(dense["flops_per_step"].values())
            assert pruned["visual_keep_ratio"] == pytest.approx(0.22, abs=0.03) and "ASSUMED" in stage["kept"]


@pytest.mark.slow
def test_llava_15_on_eight_a100s_takes_about_what_its_authors_say(tmp_path: Path) -> None:
    """3.5 and 10 hours, at the utilisation that is assumed; and the plan says what a smaller machine would need."""
    base = ["+experiment=llava7b_dense", f"runs_dir={tmp_path}", f"data.root={tmp_path}", "plan.device=a100_80gb"]
    stages = run(compose_config(base))["stages"]
    assert stages["pretrain"]["hours"] == pytest.approx(3.5, rel=0.3)
    assert stages["instruct"]["hours"] == pytest.approx(10, rel=0.3)
    alone = ["trainer.devices=1", "strategy.name=single", "stage.pretrain.strategy=single", "stages=[instruct]"]
    entry = run(compose_config([*base, *alone]))["stages"]["instruct"]["dense"]
    assert not entry["fits"] and entry["fits_with"] == ["peft=lora"]
    assert entry["verdict"].startswith("instruct, dense: does not fit: ")
    assert entry["verdict"].endswith("fits with peft=lora (adapters want learning rates of their own)")


def test_a_run_of_the_same_settings_says_what_it_kept(tmp_path: Path) -> None:
    config = compose_config(["+experiment=smoke", f"runs_dir={tmp_path}", "task=plan", "plan.samples=32"])
    written = run_dir(config) / "instruct" / "metrics.jsonl"
    written.parent.mkdir(parents=True)
    written.write_text("".join(json.dumps({"step": s, "visual_keep_ratio": r}) + "\n" for s, r in ((1, 0.5), (2, 0.7))))
    stages = run(config)["stages"]
    assert "measured" in stages["instruct"]["kept"]
    assert stages["instruct"]["pruned"]["visual_keep_ratio"] == pytest.approx(0.6, abs=0.03)
    assert "ASSUMED" in stages["pretrain"]["kept"]


def test_hours_on_a_cpu_follow_its_measured_throughput(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data sheet says nothing of this machine, and bf16 is much faster than fp32 on some and slower on others."""
    asked = []

    def measured(device: torch.device, dtype: torch.dtype) -> float:
        asked.append((device.type, dtype))
        return 0.5

    monkeypatch.setattr(plan, "measured_tflops", measured)
    command = ["+experiment=smoke", f"runs_dir={tmp_path}", "plan.samples=32", "plan.device=cpu", "stages=[instruct]"]
    result = run(compose_config([*command, "trainer.precision=bf16", "plan.mfu=0.25"]))
    assert asked == [("cpu", torch.bfloat16)]
    assert "cpu, bfloat16 (0.5 TFLOP/s measured now, 0.25 of it assumed)" in capsys.readouterr().out
    dense = result["stages"]["instruct"]["dense"]
    assert dense["step_seconds"] == pytest.approx(sum(dense["flops_per_step"].values()) / 0.5e12 / 0.25)
