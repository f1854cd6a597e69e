"""Every image keeps something in stage 2, against plain loops."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from model.test_every_pruner import sample
from tiny import packed, tiny_llava
from torch import Tensor

from mmprune_train.config.compose import as_saved, load_pruner
from mmprune_train.data.batch import collate
from mmprune_train.errors import UserError
from mmprune_train.pruning import Kind, language_scores

CHATS = [[(2, 4, 2)], [(1, 3, 2), (3, 2, 1)], [(1, 5, 1)], [(0, 3, 2)]]


def by_place(view: Any) -> Tensor:
    """The later a token stands, the less it is worth; text is worth more than all patches."""
    return 2.0 * ~view.sequence.visual - view.sequence.slot / 1000


@pytest.fixture
def first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_scores, "random_language", by_place)


def left(language: dict[str, Any], chats: list = CHATS, vision: Any = None) -> tuple[list[list[int]], Any]:
    """Per sample, the patches of each of its images that leave the LLM, and the output."""
    settings = {"name": "language_only", "language": {"layer": 1, "score": "random", **language}}
    model = packed(tiny_llava(), settings | ({"vision": vision} if vision else {}))
    batch = collate([sample(number, turns) for number, turns in enumerate(chats)])
    with torch.no_grad():
        output = model.forward_packed(batch.sequence, batch.pixel_values)
    sequence, found = output.sequence, []
    start = 0
    for number, turns in enumerate(chats):
        count = sum(images for images, *_ in turns)
        mine = Counter(sequence.picture[sequence.visual & (sequence.segment == number)].tolist())
        found.append([mine[start + image] for image in range(count)])
        start += count
    return found, output


def expected(ranking: str, count: int, least: int) -> list[list[int]]:
    """What stays of each image where everything is ranked by its place, earlier first, in rows of a turn."""
    found: list[list[int]] = []
    for turns in CHATS:
        found.append([])
        for images, words, _ in turns:
            order = [image for image in range(images) for _ in range(9)]
            text = words if ranking == "joint" and images else 0
            floor = [min(least, 9)] * images
            more = max(0, count - sum(floor) - text)  # text ranks above every patch that the floor does not hold
            rest = [image for image in range(images) for _ in range(9 - floor[image])]
            picked = Counter(rest[:more])
            assert len(order) == 9 * images
            found[-1] += [floor[image] + picked[image] for image in range(images)]
    return found


@pytest.mark.usefixtures("first_wins")
@pytest.mark.parametrize("least", [0, 1, 3, 9, 20])
@pytest.mark.parametrize("count", [1, 4, 7, 20])
@pytest.mark.parametrize("ranking", ["per_kind", "joint"])
def test_every_image_keeps_its_best_in_exchange_for_others(ranking: str, count: int, least: int) -> None:
    budget = {"method": "fixed_count", "count": count}
    found, output = left({"knee": budget, "ranking": ranking, "min_per_image": least, "layer": [1, 2]})
    assert found == expected(ranking, count, least)
    for number, turns in enumerate(CHATS):
        for turn, (images, _, _) in enumerate(turns, start=1):
            mine = (output.sequence.segment == number) & (output.sequence.turn == turn)
            visual = int((mine & output.sequence.visual).sum())
            if ranking == "per_kind" and images:  # the count holds unless the images' least is more
                assert visual == min(9 * images, max(count, images * min(least, 9)))
            best = output.sequence.patch[mine & output.sequence.visual]
            counts = found[number][_first(turns, turn) :][:images]
            assert best.tolist() == [patch for size in counts for patch in range(size)]


def _first(turns: list, turn: int) -> int:
    return sum(images for images, *_ in turns[: turn - 1])


@pytest.mark.usefixtures("first_wins")
def test_what_may_not_be_dropped_counts_and_stage_one_comes_first() -> None:
    budget = {"method": "fixed_count", "count": 2}
    vision = {"enabled": True, "knee": {"method": "fixed_count", "count": 4}}
    for order in ("raster", "rank"):
        found, _ = left({"knee": budget, "min_per_image": 3}, vision=vision | {"order": order})
        assert found == [[3, 3], [3, 3, 3, 3], [3], []]
    found, output = left({"knee": budget, "min_per_image": 3, "no_text": "last_token_attention"}, [[(2, 0, 2)]])
    assert found == [[3, 3]]
    assert int((output.sequence.kind == Kind.ANSWER).sum()) == 2


def test_one_image_ranked_by_itself_is_not_touched() -> None:
    torch.manual_seed(0)
    for name in ("twostage", "fastv", "pyramiddrop"):
        kept = []
        for least in (0, 1):
            model = packed(tiny_llava(), {"name": name, "language": {"min_per_image": least}})
            batch = collate([sample(0, [(1, 5, 2)]), sample(1, [(1, 3, 2), (1, 4, 1)])])
            with torch.no_grad():
                kept.append(model.forward_packed(batch.sequence, batch.pixel_values).sequence.slot.tolist())
        assert kept[0] == kept[1]


@pytest.mark.usefixtures("first_wins")
def test_the_same_picture_shown_twice_counts_as_two() -> None:
    settings = {"layer": 1, "score": "random", "knee": {"method": "fixed_count", "count": 1}, "min_per_image": 2}
    model = packed(tiny_llava(), {"name": "language_only", "language": settings})
    ids = torch.tensor([[1, *[3] * 18, 9, 8, 7, 6]])
    picture = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        model(input_ids=ids, pixel_values=picture.repeat(2, 1, 1, 1))
    assert model.last_pruning.layers_visual[-1].tolist() == [4]


def test_presets_held_to_their_authors_have_no_floor_and_the_rest_do() -> None:
    floors = {name: load_pruner(name).language.min_per_image for name in ("fastv", "pyramiddrop", "sparsevlm")}
    assert set(floors.values()) == {0}
    assert load_pruner("twostage").language.min_per_image == load_pruner("language_only").language.min_per_image == 1
    with pytest.raises(UserError, match="min_per_image=-1 must be at least 0"):
        load_pruner({"name": "twostage", "language": {"min_per_image": -1}})


def test_a_folder_saved_before_the_key_keeps_what_it_did() -> None:
    old = {"name": "twostage", "language": {"layer": 2}}
    assert load_pruner(as_saved(old)).language.min_per_image == 0
    assert load_pruner(as_saved({"name": "encoder_only"})).language.min_per_image == 0
    assert load_pruner(as_saved({**old, "language": {"min_per_image": 2}})).language.min_per_image == 2
    assert old["language"] == {"layer": 2}  # not written into
