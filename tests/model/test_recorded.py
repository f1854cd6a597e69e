"""Our presets on inputs that authors' own code was run on, held to what it answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model.recordings import FOLDER, MADE, NOTHING, RecordedImages, Recording
from torch import Tensor

FILES = sorted(FOLDER.glob("*.safetensors"))
RECORDED = {
    "cdpruner", "dart", "divprune", "fastervlm", "fastv", "holov", "mmtok", "prumerge", "prumerge_plus", "pyramiddrop",
    "recoverable", "scope", "sparsevlm", "visionzip", "vispruner", "vscan",
}  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def recordings(stage: str) -> pytest.MarkDecorator:
    files = [file for file in FILES if Recording.read(file).told["stage"] == stage]
    return pytest.mark.parametrize("file", files, ids=[file.stem for file in files])


def in_plain_order(tokens: list[int]) -> list[int]:
    """Places of a list of tokens, these ascending and behind them the made ones as they come."""
    return sorted(range(len(tokens)), key=lambda place: (tokens[place] == MADE, tokens[place], place))


@recordings("vision")
def test_stage_one_is_theirs(file: Path) -> None:
    """Kept patches, their order where ours is meant to be theirs, and what enters the projector."""
    recording = Recording.read(file)
    features, view = recording.images()
    side = RecordedImages(recording)
    kept, _ = side.pruner.keep_patches(view, lambda: side._project_to_look(features))
    patches = side.cut_images(features, view)
    mine = patches.chosen.split(patches.kept.sum(1).tolist())
    for image, wanted in enumerate(recording.tensors["entering"]):
        expected = wanted[wanted != NOTHING].tolist()
        entering = patches.entering[image]
        found = torch.where(kept[image, entering], entering, MADE).tolist()
        states = mine[image][torch.searchsorted(patches.indices[image], entering)]
        theirs = recording.tensors.get("chosen", torch.empty(len(kept), 0, 0))[image]
        ours, order = in_plain_order(found), in_plain_order(expected)
        assert [found[i] for i in ours] == [expected[i] for i in order]
        if recording.told.get("ordered", True):
            assert found == expected
        if "chosen" in recording.tensors:
            torch.testing.assert_close(states[ours], theirs[: len(expected)][order], **CLOSE)


@recordings("language")
def test_stage_two_is_theirs(file: Path) -> None:
    """Before each layer: the tokens that stay, in their order, and the states of those that were made."""
    recording = Recording.read(file)
    pruner, sequence = recording.pruner(), recording.sequence()
    sequence = pruner.enter_language(sequence, recording.tensors.get("embeddings", torch.empty(len(sequence), 0)))
    for place in range(recording.told.get("layers", 1)):
        hidden, query, keys, stays = (
            recording.tensors[f"{place}.{name}"] for name in ("hidden", "query", "keys", "stays")
        )

        def query_keys(rows: Tensor, query: Tensor = query, keys: Tensor = keys) -> tuple[Tensor, Tensor]:
            return query[rows], keys

        entered = replace(sequence, ids=torch.arange(len(sequence)))
        normed = recording.tensors.get(f"{place}.normed")
        pruned = pruner.prune_tokens(entered, hidden, query_keys, place, normed=normed)
        assert pruned is not None
        states, mask, _, made = pruned
        sequence, states = pruner.shortened(entered, states, mask, made)
        assert torch.where(made[sequence.ids], MADE, sequence.ids).tolist() == stays.tolist()
        if f"{place}.states" in recording.tensors:
            torch.testing.assert_close(states, recording.tensors[f"{place}.states"], **CLOSE)


def test_no_record_is_missing() -> None:
    assert {file.stem for file in FILES} >= RECORDED


def test_every_record_says_where_it_comes_from() -> None:
    for file in FILES:
        told = Recording.read(file).told
        assert {"pruner", "repository", "commit", "function", "seed", "stage"} <= told.keys(), file.name
        assert len(told["commit"]) == 40 and told["stage"] in ("vision", "language"), file.name
        assert file.stat().st_size < 200_000, file.name
