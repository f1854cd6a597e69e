"""Global batches packed to a token budget, from exact lengths and from estimated ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmprune_train.config.schema import EncoderConfig, StageConfig
from mmprune_train.data import loader as loader_module
from mmprune_train.data.batch import Batch
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.data.lengths import Estimate, KeptTokens, Length
from mmprune_train.data.loader import TrainLoader, train_loader
from mmprune_train.data.packing import pack
from mmprune_train.data.records import read_annotations
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.packed.sequence import Kind

EXACT = Estimate(0.0, 0.0, 0)
PATCHES = 4


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_packing_holds_the_budget_with_few_balanced_micro_batches(data: st.DataObject) -> None:
    world, budget = data.draw(st.integers(1, 4)), 100
    tokens = data.draw(st.lists(st.integers(1, budget), min_size=world, max_size=40))
    tokens = tokens[: len(tokens) // world * world]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(tokens) - 1)))) | {0, len(tokens)})
    groups = [list(range(a, b)) for a, b in pairwise(cuts)]
    bins = pack(groups, [Length(n) for n in tokens], EXACT, budget, world)
    assert sorted(place for places in bins for place in places) == list(range(len(tokens))), "each once"
    assert all(bins) and len(bins) % world == 0, "no rank is without a sample, all have equally many"
    loads = [sum(tokens[place] for place in places) for places in bins]
    assert max(loads) <= budget
    # a greedy schedule is never fuller than the mean plus the longest item, so this many would have done
    enough = math.ceil(sum(tokens) / max(1, budget - max(tokens)) / world)
    assert len(bins) // world <= max(1, enough)
    assert len(bins) // world >= math.ceil(sum(tokens) / budget / world)
    if all(len(group) == 1 for group in groups):
        assert max(loads) - min(loads) <= max(tokens), "balanced"


def test_many_samples_fill_the_budget_and_ranks_carry_the_same() -> None:
    random = np.random.default_rng(0)
    tokens = random.lognormal(5, 0.7, size=256).clip(20, 2000).astype(int).tolist()
    bins = pack([[k] for k in range(256)], [Length(n) for n in tokens], EXACT, 4096, world=4)
    loads = np.array([sum(tokens[place] for place in places) for places in bins]).reshape(-1, 4)
    assert len(loads) == math.ceil(sum(tokens) / 4096 / 4), "as few as there can be"
    assert loads.max() / loads.mean() < 1.01 and loads.sum(0).max() / loads.sum(0).mean() < 1.01


def test_samples_of_one_image_stay_in_one_micro_batch_where_they_fit() -> None:
    lengths = [Length(n) for n in (30, 30, 30, 40, 40, 40, 10, 10)]
    bins = pack([[0, 1, 2], [3, 4, 5], [6], [7]], lengths, EXACT, 100, world=1)
    assert [0, 1, 2] in [[p for p in places if p < 3] for places in bins]
    assert len(bins) == 3, "120 tokens of one image do not fit together"


def test_a_sample_that_may_be_too_long_is_alone() -> None:
    estimate = Estimate(60.0, 20.0, 100)
    lengths = [Length(20, 1, 1), *[Length(10)] * 3]
    assert estimate.safe(lengths[0]) == 120
    assert sorted(pack([[0], [1], [2], [3]], lengths, estimate, 100, world=1)) == [[0], [1, 2, 3]]


def test_the_margin_leaves_few_overruns() -> None:
    random = np.random.default_rng(1)
    images = 20_000
    left = random.gamma(4, 25, size=images).clip(1, 400).astype(int)
    kept = KeptTokens(400, lag=0)
    kept.observe([images, images, left.sum(), (left**2).sum()])
    estimate = kept.at(1)
    assert estimate.mean == pytest.approx(left.mean()) and estimate.deviation == pytest.approx(left.std())
    over, count, full = 0, 0, []
    for start in range(0, images, 200):
        bins = pack([[k] for k in range(200)], [Length(30, 1, 1)] * 200, estimate, 2640, world=1)
        loads = [sum(30 + left[start + place] for place in places) for places in bins]
        over, count, full = over + sum(load > 2640 for load in loads), count + len(loads), full + loads
    assert 0 < over / count < 0.04 and np.mean(full) / 2640 > 0.8


def test_samples_of_several_images_tell_the_spread_of_one() -> None:
    random = np.random.default_rng(2)
    many = random.integers(1, 5, size=50_000)
    left = np.array([random.normal(100, 15, size=n).sum() for n in many])
    kept = KeptTokens(400, lag=0)
    kept.observe([len(many), many.sum(), left.sum(), (left**2 / many).sum()])
    assert kept.at(1).mean == pytest.approx(100, rel=0.01) and kept.at(1).deviation == pytest.approx(15, rel=0.02)


def test_an_estimate_knows_what_was_seen_a_lag_before_and_goes_on_from_its_state() -> None:
    def seen(step: int) -> list[float]:
        return [10, 10, 10 * (50 + step), 10 * (50 + step) ** 2]

    kept = KeptTokens(100, lag=3, enough=15)
    means = []
    for step in range(12):
        means.append(kept.at(step).mean)
        ahead = [kept.at(step + k).mean for k in range(4)]  # what workers read ahead is planned as it would be later
        kept.observe(seen(step))
        assert ahead[1:] == [kept.at(step + 1 + k).mean for k in range(3)]
        if step == 8:
            other = KeptTokens(100, lag=3, enough=15)
            other.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    assert means[:5] == [100] * 5, "all patches until 15 images have been seen, three steps before"
    assert 50 < means[5] < 51 and means[5:] == sorted(means[5:])
    for step in range(9, 12):
        assert other.at(step).mean == means[step]
        other.observe(seen(step))
    with pytest.raises(AssertionError, match="planned before"):
        other.at(16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty samples with answers of different lengths; two of three have an image, of two colours."""
    for number, colour in enumerate(["red", "green"]):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{number}.png")
    samples = []
    for number in range(40):
        image = {} if number % 3 == 0 else {"image": f"{number % 2}.png"}
        question = ("<image>\n" if image else "") + "what is it?"
        answer = " ".join(["a red shape"] * (1 + number * 7 % 11))
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        samples.append({"id": f"s{number}", "conversations": talk, **image})
    (tmp_path / "a.json").write_text(json.dumps(samples))
    return tmp_path


def budgeted(
    folder: Path,
    budget: int = 350,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    visual_tokens: Callable[[Path], int] | None = None,
    max_length: int = 256,
) -> TrainLoader:
    tokenizer = tiny_tokenizer()
    return train_loader(
        read_annotations(folder / "a.json", folder).records,
        get_template("v1", tokenizer),
        tokenizer,
        ImageReader(image_processor(EncoderConfig(name="tiny", image_size=16, patch_size=8), "square")),
        PATCHES,
        StageConfig(max_length=max_length, global_batch_size=12, group_by_modality=True, token_budget=budget),
        seed=3,
        rank=rank,
        world=world,
        num_workers=num_workers,
        visual_tokens=visual_tokens,
    )


def left_of(image: Path) -> int:
    return 1 + 2 * int(image.stem)


def tokens_of(batch: Batch) -> int:
    """That enter the LLM when `left_of` is what stage 1 leaves; from the batch itself."""
    text = int((batch.sequence.kind != Kind.VISUAL).sum())
    rows = batch.sequence.image[batch.sequence.patch == 0].tolist()
    return text + sum(left_of(Path(batch.images[row])) for row in rows)


def test_exact_lengths_keep_every_rank_within_the_budget(folder: Path) -> None:
    ranks = [list(budgeted(folder, rank=r, world=2, visual_tokens=left_of).steps(0, 10)) for r in range(2)]
    alone = list(budgeted(folder, visual_tokens=left_of).steps(0, 10))
    seen = []
    for mine, other, whole in zip(*ranks, alone, strict=True):
        assert len(mine) == len(other) and all(tokens_of(batch) <= 350 for batch in mine + other)
        ids = sorted(id for batch in mine + other for id in batch.ids)
        assert len(ids) == 12 and ids == sorted(id for batch in whole for id in batch.ids)
        seen += ids
    assert len(set(seen[:36])) == 36 and len(set(seen)) == 40
    assert len({len(batches) for batches in alone}) > 1, "lengths decide how many micro-batches a step has"
    assert sum(tokens_of(b) for batches in alone for b in batches) / sum(350 * len(b) for b in alone) > 0.7


@pytest.mark.parametrize("learns", [False, True])
def test_the_plan_is_the_same_for_any_number_of_workers_and_after_a_resume(
    folder: Path, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "KeptTokens", partial(KeptTokens, lag=4, enough=5))

    def plans(num_workers: int, start: int = 0, state: dict | None = None) -> tuple[list, list]:
        loader = budgeted(folder, num_workers=num_workers, visual_tokens=None if learns else left_of)
        if state is not None and loader.kept is not None:
            loader.kept.load_state_dict(state)
        ids, states = [], []
        for batches in loader.steps(start, 12):
            ids.append([batch.ids for batch in batches])
            if loader.kept is not None:
                loader.kept.observe([8, 8, 8 * 2, 8 * 2**2])
                states.append(loader.kept.state_dict())
        return ids, states

    whole, states = plans(0)
    assert plans(2)[0] == whole and plans(3)[0] == whole
    assert plans(2, start=7, state=states[6] if learns else None)[0] == whole[7:]


def test_a_sample_longer_than_the_budget_is_named_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"a\.json\[\d+\] \(id s\d+\): its \d+ tokens exceed .*token_budget=100; raise"):
        budgeted(folder, budget=100, visual_tokens=left_of)
    assert "reading 40 lengths" in capsys.readouterr().out
    budgeted(folder, budget=100, visual_tokens=left_of, max_length=100)
    assert not capsys.readouterr().out, "no sample can be longer than max_length"


def test_text_that_is_too_long_is_named_also_where_images_are_estimated(folder: Path) -> None:
    pictured = json.loads((folder / "a.json").read_text())
    (folder / "a.json").write_text(json.dumps([sample for sample in pictured if "image" in sample]))
    with pytest.raises(UserError, match=r"its \d+ tokens of text alone exceed .*token_budget=60; raise"):
        budgeted(folder, budget=60)
