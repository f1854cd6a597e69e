"""DART and VScan on inputs that published code was run on, held to what it answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from model.recordings import Recording
from torch import Tensor

FOLDER = Path(__file__).parent / "recorded_inside"


def test_dart_keeps_what_published_code_keeps() -> None:
    recording = Recording.read(FOLDER / "dart.safetensors")
    hidden, normed, query, keys, stays = (
        recording.tensors[f"0.{name}"] for name in ("hidden", "normed", "query", "keys", "stays")
    )

    def query_keys(rows: Tensor) -> tuple[Tensor, Tensor]:
        return query[rows], keys

    pruned = recording.pruner().prune_tokens(recording.sequence(), hidden, query_keys, normed=normed)
    assert pruned is not None
    assert pruned[1].nonzero().squeeze(1).tolist() == stays.tolist()
    assert len(stays) < len(hidden)


def test_vscan_keeps_and_merges_what_its_authors_code_does() -> None:
    recording = Recording.read(FOLDER / "vscan.safetensors")
    tensors = recording.tensors
    _, shallow = recording.images()
    query, keys = (tensors[f"block.cls_query_keys.{part}"] for part in (0, 1))
    deep = replace(shallow, cls_query_keys=lambda: (query, keys))
    view = replace(shallow, block=lambda _: deep)
    pruner = recording.pruner()
    kept, scores = pruner.keep_patches(view)
    features, places = pruner.merge_patches(tensors["projected"], kept, scores, view)
    assert places.nonzero()[:, 1].tolist() == tensors["entering"].flatten().tolist()
    torch.testing.assert_close(features[places], tensors["chosen"].flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert pruner.merges_projected and 0 < int(kept.sum()) < kept.shape[1]
