"""Schedules in training: metrics show them, a step's micro-batches agree, and the trained model is free of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import annotate, labels_of, tiny_inputs
from training.short import fit

STEPS = 8


def settings(name: str, **more: object) -> dict:
    """Two patches of nine, no stage 2: a keep ratio that one can count."""
    knee = {"method": "fixed_count", "count": 2}
    return {"name": "encoder_only", "vision": {"knee": knee}, "schedule": {"name": name, **more}}


def test_metrics_show_the_annealing_and_the_model_ends_with_its_own_budget(tmp_path: Path) -> None:
    pruner = settings("anneal", start=0.25, end=0.75, shape="linear")
    rows, model = fit(tmp_path, batch_size=8, window=1, pruner=pruner, steps=STEPS)
    kept = [(row["tokens_stage1"] - (row["tokens_dense"] - 8 * 9)) / 8 for row in rows]
    assert kept == [9, 9, 9, 7, 6, 4, 2, 2]  # 2 + 7 * (1, 1, 1, 0.75, 0.5, 0.25, 0, 0), to the nearest token
    ratios = [row["visual_keep_ratio"] for row in rows]
    assert ratios == [pytest.approx(k / 9) for k in kept] and rows[0]["keep_ratio"] == 1.0 > rows[-1]["keep_ratio"]
    model.annotate = annotate
    inputs = tiny_inputs([1], [6])
    for mode in (model.train(), model.eval()):  # not the mode but a training step moves budgets
        with torch.no_grad():
            mode(**inputs, labels=labels_of(inputs))
        assert model.last_pruning.stage1_visual.tolist() == [2]
    model.generate(**inputs, max_new_tokens=2)
    assert model.last_pruning.stage1_visual.tolist() == [2]


@pytest.mark.parametrize("name", ["anneal", "random"])
def test_micro_batches_of_a_step_agree(tmp_path: Path, name: str) -> None:
    whole, model = fit(tmp_path / "whole", batch_size=8, window=1, pruner=settings(name))
    split, other = fit(tmp_path / "split", batch_size=2, window=4, pruner=settings(name))
    for a, b in zip(whole, split, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["tokens_stage1"] == b["tokens_stage1"]
    for p, q in zip(model.hf.parameters(), other.hf.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=0)


def test_random_shares_are_within_their_range_and_follow_the_seed(tmp_path: Path) -> None:
    def ratios(folder: str, seed: int) -> list[float]:
        pruner = settings("random", low=0.3, high=0.7)
        rows, _ = fit(tmp_path / folder, batch_size=4, window=1, pruner=pruner, steps=STEPS, seed=seed)
        return [row["visual_keep_ratio"] for row in rows]

    first = ratios("a", 7)
    assert all(3 / 9 - 1e-9 <= ratio <= 6 / 9 + 1e-9 for ratio in first) and len(set(first)) > 2
    assert ratios("b", 7) == first != ratios("c", 8)
