"""Intervals of benchmarks' own numbers: what is drawn together, and what is drawn twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmprune_train.evaluation import significance
from mmprune_train.evaluation.benchmarks import scoring
from mmprune_train.evaluation.benchmarks.item import Item
from mmprune_train.evaluation.benchmarks.run import Answer, judged, numbers, scored
from mmprune_train.evaluation.benchmarks.scoring import Metric
from mmprune_train.evaluation.generate import Prediction
from mmprune_train.evaluation.metrics.mme import COGNITION, PERCEPTION
from mmprune_train.evaluation.significance import Scored, compare

SEEN = (Path("a.png"),)


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "RESAMPLES", 40)


def answered(metric: Metric, kinds: list[str], groups: list[str], said: Callable[[int], str]) -> list[Answer]:
    """Questions whose answer is yes and no in turn."""
    items = [
        Item(str(n), (), f"Is it {n}?", (("yes", "no")[n % 2],), kind, "", "", group)
        for n, (kind, group) in enumerate(zip(kinds, groups, strict=True))
    ]
    return judged(items, metric, [Prediction(item.question, said(n), {}) for n, item in enumerate(items)])


def guesses(seed: int) -> Callable[[int], str]:
    generator = random.Random(seed)
    return lambda number: generator.choice(["Yes", "No"])


def test_a_picture_of_mme_that_is_drawn_twice_is_two_pictures() -> None:
    """The sum of accuracy and accuracy+ over tasks, worked out from the drawn pictures themselves."""
    kinds = [task for task in (*PERCEPTION, *COGNITION) for _ in range(6)]
    groups = [f"{n // 2 % 3}.jpg" for n in range(len(kinds))]  # the same names in every task
    found = answered(scoring.MME, kinds, groups, guesses(1))
    column = scored(found, scoring.MME)
    assert column is not None and len(column.units) == 14 * 3 and column.score == numbers(found, scoring.MME)["total"]
    generator = np.random.default_rng(significance.SEED)
    for row in range(significance.RESAMPLES):
        total = 0.0
        for first in range(0, len(kinds), 6):
            pictures = [first + 2 * int(n) for n in generator.integers(3, size=3)]
            right = [[column.scores[at], column.scores[at + 1]] for at in pictures]
            total += 100 * sum(map(sum, right)) / 6 + 100 * sum(map(all, right)) / 3
        assert column.drawn["total"][row] == pytest.approx(total)
    assert {"perception", "cognition", "accuracy", f"tasks.{COGNITION[0]}"} <= set(column.intervals)
    other = scored(answered(scoring.MME, kinds, groups, guesses(2)), scoring.MME)
    assert other is not None and (told := compare(column, other)) is not None and told.test == "bootstrap"
    assert told.difference == pytest.approx((column.score or 0) - (other.score or 0))


def pope(size: int, shared: int, own: int, wrong: Collection[int]) -> list[Answer]:
    """`size` questions of one split, of which the first `shared` are another's, too, which has `own` more."""
    numbers = [*range(size), *range(shared), *range(size, size + own)]
    kinds = ["random"] * size + ["popular"] * (shared + own)
    items = [
        Item(f"{kind}/{n}", (), f"Is it {n}?", (("yes", "no")[n % 2],), kind, kind, "")
        for n, kind in zip(numbers, kinds, strict=True)
    ]
    said = [("yes", "no")[(n + (n in wrong)) % 2] for n in numbers]
    told = [Prediction(item.question, text, {}) for item, text in zip(items, said, strict=True)]
    return judged(items, scoring.POPE, told)


def test_f1_of_pope_is_drawn_with_a_question_in_all_its_splits() -> None:
    wrong = {0, 3, 4, 9, 12, 13, 17, 22, 25, 31}
    column = scored(pope(20, 10, 20, wrong), scoring.POPE)
    assert column is not None and len(column.units) == 40
    generator = np.random.default_rng(significance.SEED)
    for row in range(significance.RESAMPLES):
        both, random_alone, popular_alone = (
            [first + int(n) for n in generator.integers(size, size=size)]
            for first, size in ((0, 10), (10, 10), (20, 20))
        )
        each = []
        for split in (both + random_alone, both + popular_alone):
            counts = Counter((n % 2 == 0, n not in wrong) for n in split)
            hit, missed, false = counts[True, True], counts[True, False], counts[False, False]
            each.append(2 * hit / (2 * hit + missed + false) if hit else 0.0)
        assert column.drawn["f1"][row] == pytest.approx(sum(each) / 2)


def test_copies_of_a_question_make_no_test_surer() -> None:
    """F1, and so no McNemar, which is of how many are right; in two splits as wide as in one."""
    told = []
    for shared in (0, 40):
        right, worse = (scored(pope(40, shared, 0, wrong), scoring.POPE) for wrong in ((), (0, 2, 4, 6)))
        assert right is not None and worse is not None
        found = compare(right, worse)
        assert found is not None and found.test == "bootstrap"
        told.append((found.difference, found.interval, found.p))
    assert told[0] == told[1]


def test_the_p_of_another_number_than_all_accuracy_is_no_mcnemar() -> None:
    """ScienceQA's questions without an image change nothing about the number of those with one."""
    kinds = ["image"] * 10 + ["text"] * 20
    items = [
        Item(f"{n}", SEEN if kind == "image" else (), f"{n}?", ("A",), kind, "", "", options={"A": "", "B": ""})
        for n, kind in enumerate(kinds)
    ]

    def column(said: str) -> Scored:
        told = [Prediction(item.question, "A" if item.kind == "image" else said, {}) for item in items]
        found = scored(judged(items, scoring.SCIENCEQA, told), scoring.SCIENCEQA)
        assert found is not None
        return found

    assert column("A").seen == [True] * 10 + [False] * 20
    told = compare(column("A"), column("B"))
    assert told is not None and (told.difference, told.p, told.test) == (0, 1, "bootstrap")


def test_means_are_the_same_by_the_short_way_and_the_long_one() -> None:
    found = answered(scoring.GQA, ["a"] * 9 + ["b"] * 12, [""] * 21, guesses(4))
    long = replace(scoring.GQA, aggregate=lambda items, scores: scoring.mean(items, scores))
    one, other = scored(found, scoring.GQA), scored(found, long)
    assert one is not None and other is not None and one.numbers is None and other.numbers is not None
    assert one.values == pytest.approx(other.values) and set(one.values) == {"accuracy", "kinds.a", "kinds.b"}
    for name, drawn in one.drawn.items():
        assert drawn == pytest.approx(other.drawn[name])


def test_what_cannot_be_told_is_no_column() -> None:
    found = answered(scoring.MME, ["existence"] * 4, ["a", "a", "b", "b"], guesses(5))
    assert scored(found, scoring.MME) is None, "no total without all tasks"
    unknown = [replace(answer, score=None) for answer in found]
    assert scored(unknown, scoring.MME) is None
