"""A further turn on the cache of those before: what reading everything anew gives, or an error that says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.test_turns import ASSISTANT, USER, Turn, read, sample
from tiny import IMAGE_TOKEN, SIDE, packed, tiny_llava
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.model.llava import PackedLlava

HALF = {"method": "fixed_ratio", "ratio": 0.5}
TWICE = {"layer": [1, 3], "knee": HALF, "per_layer_budgets": None}
PRUNERS: dict[str, Any] = {
    "none": "none",
    "encoder_only": {"name": "encoder_only", "vision": {"knee": HALF}},
    "original_positions": {"name": "encoder_only", "vision": {"knee": HALF, "positions": "original"}},
    "rank_order": {"name": "prumerge", "vision": {"knee": HALF}},
    "twostage": {"name": "twostage", "vision": {"knee": HALF}, "language": TWICE},
    "renumbered": {"name": "twostage", "language": {**TWICE, "positions": "contiguous"}},
    "original_then_renumbered": {
        "name": "twostage",
        "vision": {"knee": HALF, "positions": "original"},
        "language": {**TWICE, "positions": "contiguous"},
    },
    "fastv": {"name": "fastv", "language": {"knee": HALF, "turns_in_generation": None}},
    "pyramid_of_the_first": {
        "name": "pyramiddrop",
        "language": {"turns": "mean", "turns_in_generation": "first", "layer": [1, 2]},
    },
    "sparsevlm": {
        "name": "sparsevlm",
        "language": {"layer": [1, 3], "per_layer_budgets": [5, 3], "merge_args": {"size": 3}},
    },
    "key_norm": {"name": "language_only", "language": {**TWICE, "score": "key_norm", "turns": "mean"}},
    "dart": {"name": "dart", "language": {"knee": {"count": 6}, "selection_args": {"pivots": 2, "text_pivots": 1}}},
    "pool": "pool",
    "cdpruner": {"name": "cdpruner", "vision": {"knee": HALF}},
    "mmtok": {"name": "mmtok", "vision": {"knee": HALF}},
    "downsample": {"name": "downsample", "vision": {"knee": HALF}},
}
FIRST: list[list[Turn]] = [[(1, 4, 0)], [(2, 3, 0)], [(0, 5, 0)], [(1, 3, 2), (1, 5, 0)]]
SHOWS: dict[str, Any] = {"none": "none", **{name: PRUNERS[name] for name in list(PRUNERS)[1:4]}, "cdpruner": "cdpruner"}


def chatting(settings: Any, **families: str) -> PackedLlava:
    model = packed(tiny_llava(**families), settings)
    model.annotate = read
    return model


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def prompts(chats: list[list[Turn]], seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    rows = [sample(turns, seed + number) for number, turns in enumerate(chats)]
    pictures = sum(turn[0] for turns in chats for turn in turns)
    pixels = torch.randn(pictures, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return rows, padded(rows) | ({"pixel_values": pixels} if pictures else {})


def go_on(sequences: Tensor, inputs: dict[str, Tensor], asked: list[int], images: int = 0) -> dict[str, Tensor]:
    """The conversations so far, and in the same columns a question of so many words for each, padded in between."""
    more = padded([sample([(images, count, 0)], 50 + count)[1:] for count in asked])
    written = sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, written), value=1)
    return {
        "input_ids": torch.cat([sequences, more["input_ids"]], 1),
        "attention_mask": torch.cat([mask, more["attention_mask"]], 1),
    }


def answers(model: Any, given: dict[str, Tensor], count: int = 5, **more: Any) -> Any:
    fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "return_dict_in_generate": True}
    marks = {"suppress_tokens": [0, IMAGE_TOKEN, USER, ASSISTANT]}  # which `read` would take for those of a prompt
    return model.generate(**given, **fixed, **marks, output_logits=True, **more)


def same(first: Any, second: Any) -> None:
    torch.testing.assert_close(torch.stack(first.logits), torch.stack(second.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(first.sequences, second.sequences)


def same_trace(model: PackedLlava, anew: Any) -> None:
    trace = model.last_pruning
    for name in ("dense", "dense_visual", "stage1", "stage1_visual"):
        assert torch.equal(getattr(trace, name), getattr(anew, name)), name
    for name in ("layers", "layers_visual", "vision_kept", "vision_order", "language_kept"):
        assert [part.tolist() for part in getattr(trace, name)] == [part.tolist() for part in getattr(anew, name)], name
    entered = [{k: [row.tolist() for row in v] for k, v in t.language_entered.items()} for t in (trace, anew)]
    assert entered[0] == entered[1]


@pytest.mark.parametrize("asked", [[3, 5, 2, 4], [4, 4, 4, 4]], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", PRUNERS)
def test_three_turns_of_a_batch_on_one_cache_equal_reading_anew(name: str, asked: list[int]) -> None:
    model = chatting(PRUNERS[name])
    _, inputs = prompts(FIRST)
    out, given = answers(model, inputs), inputs
    if name not in ("none", "encoder_only"):
        assert model.last_pruning.keep_ratio < 1
    for turn in range(2):
        given = go_on(out.sequences, given, [count + turn for count in asked])
        anew = answers(model, {**given, "pixel_values": inputs["pixel_values"]})
        kept = model.last_pruning
        out = answers(model, given, cache=out.cache)
        same(out, anew)
        same_trace(model, kept)


@pytest.mark.parametrize("text", ["qwen3", "phi3", "gemma"])
def test_other_families_go_on(text: str) -> None:
    model = chatting(PRUNERS["twostage"], text=text)
    _, inputs = prompts(FIRST)
    out = answers(model, inputs)
    given = go_on(out.sequences, inputs, [3, 5, 2, 4])
    same(answers(model, given, cache=out.cache), answers(model, {**given, "pixel_values": inputs["pixel_values"]}))


def test_without_pruning_the_cache_goes_on_as_transformers_own() -> None:
    hf = tiny_llava()
    model = packed(hf)
    _, inputs = prompts(FIRST)
    found = []
    for one in (hf, model):
        out = answers(one, inputs)
        given = go_on(out.sequences, inputs, [4, 4, 4, 4])
        found.append(answers(one, given, cache=out.cache))
        found.append(answers(one, go_on(found[-1].sequences, given, [3, 3, 3, 3]), cache=found[-1].cache))
    same(found[0], found[2])
    same(found[1], found[3])


@pytest.mark.parametrize("name", SHOWS)
def test_a_picture_in_a_later_turn_is_read_with_the_cache(name: str) -> None:
    model = chatting(SHOWS[name])
    _, inputs = prompts(FIRST[:3])
    out = answers(model, inputs)
    given = go_on(out.sequences, inputs, [3, 5, 2], images=1)
    new = torch.randn(3, 3, SIDE, SIDE)
    pixels = torch.cat([inputs["pixel_values"][:1], new[:1], inputs["pixel_values"][1:3], new[1:]])
    anew = answers(model, {**given, "pixel_values": pixels})
    kept = model.last_pruning
    same(answers(model, {**given, "pixel_values": new}, cache=out.cache), anew)
    same_trace(model, kept)
    with pytest.raises(UserError, match="image tokens"):
        answers(model, {**given, "pixel_values": pixels}, cache=answers(model, inputs).cache)


def test_a_conversation_padded_otherwise_and_answers_that_end_early_go_on() -> None:
    """As the processor pads whole conversations: on the left, without what was written behind an answer's end."""
    model = chatting(PRUNERS["twostage"])
    rows, inputs = prompts(FIRST)
    out = answers(model, inputs)
    told = [ids[:count] for ids, count in zip(out.sequences[:, -5:], (2, 5, 1, 3), strict=True)]
    more = [sample([(0, count, 0)], 70 + count)[1:] for count in (3, 4, 5, 2)]
    given = padded([torch.cat(parts) for parts in zip(rows, told, more, strict=True)])
    anew = answers(model, {**given, "pixel_values": inputs["pixel_values"]})
    kept = model.last_pruning
    found = answers(model, given, cache=out.cache)
    same(found, anew)
    same_trace(model, kept)
    again = answers(model, go_on(found.sequences, given, [2, 3, 4, 5]), cache=found.cache)
    whole = go_on(anew.sequences, given, [2, 3, 4, 5])
    same(again, answers(model, {**whole, "pixel_values": inputs["pixel_values"]}))


@pytest.mark.parametrize("name", ["none", "twostage"])
def test_forward_takes_a_turn_by_itself_or_with_a_mask_of_everything(name: str) -> None:
    model = chatting(PRUNERS[name])
    _, inputs = prompts(FIRST)
    given = go_on(inputs["input_ids"], inputs, [3, 5, 2, 4])
    size = inputs["input_ids"].shape[1]
    with torch.no_grad():
        anew = model(**given, pixel_values=inputs["pixel_values"]).logits[:, size:]
        for mask in (given["attention_mask"], given["attention_mask"][:, size:]):
            cache = model(**inputs, use_cache=True).cache
            new = model(input_ids=given["input_ids"][:, size:], attention_mask=mask, cache=cache).logits
            torch.testing.assert_close(new, anew, rtol=1e-4, atol=1e-4, equal_nan=True)
        some = model(**given, pixel_values=inputs["pixel_values"], logits_to_keep=3).logits
        torch.testing.assert_close(some, anew[:, -3:])
        chosen = torch.tensor([-1, size + 1])
        columns = model(**given, pixel_values=inputs["pixel_values"], logits_to_keep=chosen).logits
        torch.testing.assert_close(columns, anew[:, [-1, 1]])


@pytest.mark.parametrize("name", ["none", "twostage", "fastv"])
def test_beams_and_returned_sequences_go_on(name: str) -> None:
    model = chatting(PRUNERS[name])
    _, inputs = prompts(FIRST[:2])
    out = answers(model, inputs)
    given = go_on(out.sequences, inputs, [3, 5])
    anew = {**given, "pixel_values": inputs["pixel_values"]}
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = answers(model, given, cache=out.cache, **options)
    assert torch.equal(found.sequences, answers(model, anew, **options).sequences)
    beams = answers(model, inputs, num_beams=3)  # the rows of its cache are beams
    given = go_on(beams.sequences, inputs, [4, 2])
    anew = {**given, "pixel_values": inputs["pixel_values"]}
    with pytest.raises(UserError, match="the cache holds 6 samples, input_ids 2: .*batch_select_indices"):
        answers(model, given, cache=beams.cache)
    beams.cache.batch_select_indices(torch.tensor([0, 3]))
    same(answers(model, given, cache=beams.cache), answers(model, anew))


@pytest.mark.parametrize("name", ["none", "twostage", "sparsevlm", "pyramiddrop"])
def test_drafts_change_no_answer(name: str) -> None:
    model = chatting(PRUNERS.get(name, {"name": "pyramiddrop", "language": {"layer": [1, 3]}}))
    _, inputs = prompts([[(1, 4, 0)]])
    plain = answers(model, inputs, 12)
    kept = model.last_pruning.language_kept
    helper = chatting({"name": "twostage", "language": TWICE})
    for drafts in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": helper},
        {"assistant_model": tiny_llava(seed=1)},
    ):
        found = answers(model, inputs, 12, **drafts)
        assert torch.equal(found.sequences, plain.sequences), drafts
        assert all(torch.equal(*pair) for pair in zip(model.last_pruning.language_kept, kept, strict=True))
    if name == "pyramiddrop":
        return
    given = go_on(plain.sequences, inputs, [4])
    again = answers(model, given, 9, cache=found.cache, prompt_lookup_num_tokens=2)
    assert torch.equal(again.sequences, answers(model, {**given, "pixel_values": inputs["pixel_values"]}, 9).sequences)
    with pytest.raises(UserError, match="one sample at a time"):
        answers(model, prompts(FIRST)[1], prompt_lookup_num_tokens=2)


def test_a_cropped_cache_asks_again_and_not_before_what_decided() -> None:
    for name, deep in (("encoder_only", True), ("twostage", False)):
        model = chatting(PRUNERS[name])
        _, inputs = prompts([[(1, 4, 0)]])
        out = answers(model, inputs)
        out.cache.crop(-4)
        given = go_on(inputs["input_ids"], inputs, [4])
        anew = {**given, "pixel_values": inputs["pixel_values"]}
        same(answers(model, given, cache=out.cache), answers(model, anew))
        if not deep:
            with pytest.raises(UserError, match="reaches back to tokens by which others were dropped"):
                out.cache.crop(2 - len(inputs["input_ids"][0]))
            continue
        out.cache.crop(-(out.cache.get_seq_length() - 12))  # behind the picture: another question about it
        other = torch.cat([inputs["input_ids"][:, :12], sample([(0, 5, 0)], 9)[None, 2:]], 1)
        same(answers(model, {"input_ids": other}, cache=out.cache), answers(model, {**inputs, **whole(other)}))


def test_the_first_picture_may_come_after_a_turn_of_text() -> None:
    for name in ("twostage", "fastv", "none"):
        model = chatting(PRUNERS[name])
        _, inputs = prompts([[(0, 4, 0)], [(0, 6, 0)]])
        out = answers(model, inputs)
        given = go_on(out.sequences, inputs, [3, 5], images=1) | {"pixel_values": torch.randn(2, 3, SIDE, SIDE)}
        found = answers(model, given, cache=out.cache)
        same(found, answers(model, given))
        further = go_on(found.sequences, given, [2, 4])
        same(
            answers(model, further, cache=found.cache),
            answers(model, further | {"pixel_values": given["pixel_values"]}),
        )


def whole(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"name": "language_only", "language": {**TWICE, "turns": "mean"}},
            "pruner.language.turns=mean: .*turns=first",
        ),
        (
            {"name": "language_only", "language": {**TWICE, "turns": "max"}},
            "pruner.language.turns=max: .*read the conv",
        ),
        (
            {"name": "pyramiddrop", "language": {"layer": [1, 3]}},
            "language.turns_in_generation=last: .*_generation=first",
        ),
        ("fastv", "pruner.language.turns_in_generation=last"),
        ({"name": "language_only", "language": {**TWICE, "score": "model.test_chat:looking"}}, "score=model.test_chat"),
        (
            {"name": "language_only", "language": {**TWICE, "selection": "model.test_chat:choosing"}},
            "selection=model.test_chat",
        ),
    ],
)
def test_a_turn_that_would_change_what_stays_is_refused(settings: Any, told: str) -> None:
    model = chatting(settings)
    _, inputs = prompts([[(1, 4, 0)]])
    out = answers(model, inputs)
    given = go_on(out.sequences, inputs, [4])
    with pytest.raises(UserError, match=told):
        answers(model, given, cache=out.cache)
    _, text = prompts([[(0, 4, 0)]])  # nothing was dropped of it
    out = answers(model, text)
    given = go_on(out.sequences, text, [4])
    same(answers(model, given, cache=out.cache), answers(model, given))


def looking(view: Any) -> Tensor:
    """A score of one's own."""
    return view.hidden.float().norm(dim=-1)


def choosing(scores: Tensor, counts: Tensor, view: Any, places: Tensor, row: Tensor) -> Tensor:
    """A selection of one's own: every second candidate."""
    return torch.arange(len(places), device=scores.device) % 2 == 0


def test_other_words_or_pictures_than_the_cache_holds_are_refused() -> None:
    model = chatting(PRUNERS["twostage"])
    _, inputs = prompts([[(1, 4, 0)]])

    def refused(told: str, given: dict[str, Tensor], **more: Any) -> None:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).cache
        with pytest.raises(UserError, match=told):
            model.generate(**given, cache=cache, max_new_tokens=2, **more)

    ids = inputs["input_ids"]
    other = ids.clone()
    other[0, -3] = 99
    refused("must be the whole conversation: sample 0 differs .* at token", whole(other))
    refused("must be the whole conversation", whole(sample([(0, 9, 0)], 3)[None, 1:]))
    picture = torch.full((1, 9), IMAGE_TOKEN)
    refused(
        "goes on with a question that was read",
        whole(torch.cat([ids, picture], 1)),
        pixel_values=inputs["pixel_values"],
    )
    picture = torch.cat([ids, torch.tensor([[90, 91]]), sample([(1, 3, 0)], 4)[None, 1:]], 1)
    refused("the new turn has an image", whole(picture), pixel_values=inputs["pixel_values"])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
        with pytest.raises(UserError, match="labels go with a whole conversation"):
            model(input_ids=ids, labels=ids, cache=cache)
        model.pruner = chatting("fastv").pruner
        with pytest.raises(UserError, match="other pruner settings .pruner=twostage."):
            model(input_ids=ids[:, -1:], cache=cache)
