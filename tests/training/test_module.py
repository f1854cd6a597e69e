"""The loss is one mean over the global batch, however it is split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_llava
from training.short import Loader, fit

from mmprune_train.config.compose import load_pruner
from mmprune_train.data.batch import Place
from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning import Pruner
from mmprune_train.training.stream import BatchStream, steps_of


@pytest.mark.parametrize("pruner", ["none", "twostage"])
def test_accumulation_changes_neither_loss_nor_weights(tmp_path: Path, pruner: str) -> None:
    whole, model = fit(tmp_path / "whole", batch_size=8, window=1, pruner=pruner)
    split, other = fit(tmp_path / "split", batch_size=2, window=4, pruner=pruner)
    start = dict(tiny_llava().named_parameters())
    assert len(whole) == len(split) == 3
    for a, b in zip(whole, split, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for key in ("step", "samples", "supervised_tokens", "tokens_dense", "tokens_stage1", "tokens_stage2", "lr"):
            assert a[key] == b[key], key
    moved = 0.0
    for (name, p), q in zip(model.hf.named_parameters(), other.hf.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=0)
        moved = max(moved, float((p - start[name]).detach().abs().max()))
    assert moved > 1e-3, "the steps were too small to tell"


def test_the_loss_is_the_mean_over_supervised_tokens(tmp_path: Path) -> None:
    rows, _ = fit(tmp_path, batch_size=8, window=1)
    model = PackedLlava(tiny_llava(), Pruner(load_pruner("none")))
    batch = next(Loader(8).epoch(0, 0))
    output = model.forward_packed(batch.sequence, batch.pixel_values)
    assert rows[0]["supervised_tokens"] == int(output.supervised) == batch.supervised
    assert rows[0]["loss"] == pytest.approx(float(output.loss_sum) / batch.supervised, rel=1e-5)


def test_metrics_have_the_contracts_keys(tmp_path: Path) -> None:
    rows, _ = fit(tmp_path, batch_size=4, window=2, pruner="twostage")
    keys = (
        "step epoch loss grad_norm lr samples tokens_dense tokens_stage1 tokens_stage2 tokens_layer_mean keep_ratio "
        "visual_keep_ratio supervised_tokens samples_truncated tokens_truncated steps_skipped step_seconds "
        "data_seconds samples_per_second tflops mfu"
    )
    assert list(rows[0]) == keys.split()
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["epoch"] for row in rows] == [0.5, 1.0, 1.5]
    for row in rows:
        assert row["tokens_dense"] >= row["tokens_stage1"] >= row["tokens_layer_mean"] >= row["tokens_stage2"] > 0
        assert row["keep_ratio"] == pytest.approx(row["tokens_layer_mean"] / row["tokens_dense"])
        assert row["step_seconds"] > row["data_seconds"] > 0 and row["tflops"] > 0
        assert row["mfu"] == pytest.approx(row["tflops"] / 2.5)


@pytest.mark.parametrize("pruner", ["none", "twostage"])
def test_micro_batches_may_differ_in_size_and_steps_in_their_number(tmp_path: Path, pruner: str) -> None:
    even, model = fit(tmp_path / "even", batch_size=2, window=4, pruner=pruner, steps=5)
    loader = Loader(3, 5, then=[(8,), (1, 2, 5)])
    uneven, other = fit(tmp_path / "uneven", batch_size=0, window=0, pruner=pruner, steps=5, loader=loader)
    for a, b in zip(even, uneven, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for key in ("step", "epoch", "samples", "supervised_tokens", "tokens_stage1", "lr"):
            assert a[key] == b[key], key
    for p, q in zip(model.hf.parameters(), other.hf.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=0)


def test_the_use_of_a_budget_is_measured(tmp_path: Path) -> None:
    loader = Loader(3, 5)
    rows, _ = fit(tmp_path, batch_size=0, window=0, token_budget=90, loader=loader)
    for row, batches in zip(rows, loader.steps(0, 3), strict=True):
        tokens = [len(batch.sequence.ids) for batch in batches]
        assert row["micro_batches"] == 2 and row["padding_tokens"] == 0
        assert row["budget_use"] == pytest.approx(sum(tokens) / 180)
        assert row["budget_overruns"] == sum(n > 90 for n in tokens) == 1


def test_a_stream_goes_on_where_it_was() -> None:
    def ids(stream: BatchStream) -> list[tuple[str, Place]]:
        return [(batch.ids[0], batch.place) for batch in stream]

    whole = ids(BatchStream(Loader(4, 1, 2), steps=3))
    assert [name for name, _ in whole] == ["0", "4", "5", "7", "11", "12", "14", "2", "3"]
    assert [place.step for _, place in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [(place.first, place.last) for _, place in whole[:3]] == [(True, False), (False, False), (False, True)]
    assert len({place.supervised for _, place in whole[:3]}) == 1, "one denominator a step"
    stream = BatchStream(Loader(4, 1, 2), steps=3)
    batches = iter(stream)
    for _ in range(3):
        next(batches)
    resumed = BatchStream(Loader(4, 1, 2), steps=3)
    resumed.load_state_dict(stream.state_dict())
    assert ids(resumed) == whole[3:] and resumed.epochs_done == 3 * 7 / 16


@pytest.mark.parametrize(
    ("samples", "epochs", "size", "limit", "steps"),
    [
        (10, 1, 4, None, 3),
        (10, 2, 4, None, 5),
        (3, 1, 4, None, 1),
        (8, 1, 4, None, 2),
        (10, 1, 1, 4, 4),
        (2, 1, 1, 100, 100),
    ],
)
def test_steps_of_a_stage(samples: int, epochs: int, size: int, limit: int | None, steps: int) -> None:
    assert steps_of(samples, epochs, size, limit) == steps
