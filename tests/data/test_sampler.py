"""Which samples form which global batch."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mmprune_train.data.sampler import GlobalBatches


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 17), every=st.integers(1, 4), group=st.booleans())
def test_every_epoch_holds_each_sample_once(n: int, size: int, every: int, group: bool) -> None:
    modality = [index % every == 0 for index in range(n)] if group else None
    batches = GlobalBatches(n, size, seed=1, modality=modality)
    epochs = 3
    row = flat([batches[step] for step in range(-(-epochs * n // size))])
    assert len(row) >= epochs * n
    for epoch in range(epochs):
        assert sorted(row[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_the_order_depends_on_seed_and_step_alone() -> None:
    def make(seed: int) -> GlobalBatches:
        return GlobalBatches(40, 12, seed=seed, images=[k // 5 for k in range(40)], samples_per_image=2)

    steps = [make(1)[step] for step in range(8)]
    once = make(1)
    assert [once[step] for step in reversed(range(8))] == steps[::-1]
    assert make(1).epoch(3) != make(1).epoch(4) and make(1).epoch(3) != make(2).epoch(3)


def test_global_batches_hold_one_modality_but_where_it_runs_out() -> None:
    modality = [index % 3 == 0 for index in range(500)]  # 167 and 333 samples
    batches = GlobalBatches(500, 8, seed=0, modality=modality)
    mixed = [len({modality[index] for index in batches[step]}) > 1 for step in range(3 * 500 // 8)]
    assert 0 < sum(mixed) <= 3 * 2, "what is left over of an epoch, and where two epochs meet"


def test_single_modality_data_can_be_grouped() -> None:
    assert sorted(flat([GlobalBatches(8, 4, seed=0, modality=[True] * 8)[step] for step in range(2)])) == [*range(8)]


def test_samples_of_one_image_follow_each_other_up_to_the_limit() -> None:
    images: list[int | None] = [index // 8 for index in range(64)]
    batches = GlobalBatches(64, 8, seed=0, images=images, samples_per_image=4)
    for step in range(8):
        groups = batches.groups(batches[step])
        assert [len(group) for group in groups] == [4, 4] and flat(groups) == list(range(8))
        assert all(len({images[batches[step][place]] for place in group}) == 1 for group in groups)
    alone = GlobalBatches(64, 8, seed=0, images=[None] * 64, samples_per_image=4)
    assert len(alone.groups(alone[0])) == 8


def test_fewer_samples_than_a_global_batch_come_again() -> None:
    seen = Counter(GlobalBatches(5, 12, seed=0)[0])
    assert sorted(seen.values()) == [2, 2, 2, 3, 3]
