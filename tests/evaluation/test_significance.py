"""Intervals and paired tests against slow derivations of their own, and against scipy's bootstrap."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from math import comb, fsum

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test

from mmprune_train.evaluation import significance
from mmprune_train.evaluation.significance import Scored, compare, mcnemar, two_sided


def scored(scores: Sequence[float], kinds: str = "", groups: Sequence[str] = (), **more: object) -> Scored:
    return Scored(
        list(kinds) or ["a"] * len(scores), list(groups) or [""] * len(scores), np.array(scores, float), **more
    )


def draw(size: int, seed: int, levels: int = 2) -> list[float]:
    generator = random.Random(seed)
    return [generator.randrange(levels) / (levels - 1) for _ in range(size)]


@pytest.mark.parametrize("levels", [2, 11])
def test_the_interval_of_a_mean_is_scipys(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "RESAMPLES", 20_000)
    scores = draw(80, 1, levels)
    mine = scored(scores).intervals["accuracy"]
    theirs = bootstrap((scores,), np.mean, method="percentile", n_resamples=20_000, rng=7).confidence_interval
    assert mine == pytest.approx([theirs.low, theirs.high], abs=0.013), "a step of the mean is 1/80"


def test_questions_are_drawn_within_their_kind_and_groups_whole() -> None:
    """The variance of the drawn means is the one that a stratified cluster bootstrap has on paper."""
    kinds = "a" * 12 + "b" * 30
    groups = [f"{n // 3}" for n in range(12)] + [""] * 30
    scores = draw(42, 3)
    found = scored(scores, kinds, groups)
    assert [len(unit) for unit in found.units] == [3] * 4 + [1] * 30

    def variance(sums: list[float]) -> float:
        mean = fsum(sums) / len(sums)
        return fsum((value - mean) ** 2 for value in sums)  # of a sum of as many draws

    expected = (variance([fsum(scores[n : n + 3]) for n in range(0, 12, 3)]) + variance(scores[12:])) / 42**2
    assert found.drawn["accuracy"].var() == pytest.approx(expected, rel=0.15)
    assert found.drawn["kinds.b"].var() == pytest.approx(variance(scores[12:]) / 30**2, rel=0.15)
    assert found.values["kinds.a"] == pytest.approx(fsum(scores[:12]) / 12)


def test_any_number_over_all_questions_has_an_interval() -> None:
    """F1 by hand on each of the very same draws."""
    right, wanted = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 6, [True, True, False, True, False, False] * 6

    def f1(drawn: Sequence[Sequence[int]]) -> dict[str, float]:
        numbers = [number for unit in drawn for number in unit]
        hit = sum(wanted[n] and right[n] == 1 for n in numbers)
        wrong = sum(right[n] == 0 for n in numbers)  # missed, or said without being so
        return {"f1": 2 * hit / (2 * hit + wrong)}

    found = scored(right, main="f1", numbers=f1)
    generator = np.random.default_rng(significance.SEED)
    by_hand = []
    for _ in range(significance.RESAMPLES):
        drawn = generator.integers(36, size=36)
        by_hand.append(f1([[int(n)] for n in drawn])["f1"])
    ordered = sorted(by_hand)
    low, high = found.intervals["f1"]
    assert ordered[24] <= low <= ordered[26] and ordered[973] <= high <= ordered[975]
    assert low < found.score < high


def test_a_draw_without_a_number_is_left_out_and_a_single_question_has_no_interval() -> None:
    only = scored([1.0])
    assert only.score == 1 and only.intervals == {}
    found = scored([1.0, 0.0], numbers=lambda drawn: {"accuracy": 1.0} if drawn[0] == [0] else {})
    assert np.isnan(found.drawn["accuracy"]).any() and found.intervals["accuracy"] == [1.0, 1.0]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 1), (9, 9), (3, 14), (60, 35)])
def test_mcnemar_is_the_sum_of_all_outcomes_as_unlikely(first: int, second: int) -> None:
    both = first + second
    ways = [comb(both, k) for k in range(both + 1)]
    expected = Fraction(sum(way for way in ways if way <= ways[first]), 2**both)
    assert mcnemar(first, second) == pytest.approx(float(expected))


def test_right_and_wrong_are_compared_by_the_questions_that_one_alone_has_right() -> None:
    a, b = scored([1, 1, 1, 1, 1, 1, 0, 0, 1, 1]), scored([0, 0, 0, 0, 0, 0, 1, 0, 1, 1])
    found = compare(a, b)
    assert found is not None and (found.test, found.only_first, found.only_second) == ("mcnemar", 6, 1)
    assert found.difference == pytest.approx(0.5) and found.p == pytest.approx(16 / 128)
    assert found.interval is not None and found.interval[0] < 0.5 < found.interval[1]
    reverse = compare(b, a)
    assert reverse is not None and reverse.p == found.p and reverse.difference == pytest.approx(-0.5)


def test_graded_scores_and_groups_are_compared_by_paired_draws() -> None:
    generator = random.Random(5)
    a = [generator.random() for _ in range(60)]
    b = [max(0.0, value - 0.02 - 0.1 * generator.random() * (n % 2)) for n, value in enumerate(a)]
    found = compare(scored(a), scored(b))
    assert found is not None and found.test == "bootstrap" and found.p == pytest.approx(2 / 1001)
    differences = np.array(a) - np.array(b)
    theirs = bootstrap((differences,), np.mean, method="percentile", n_resamples=5000, rng=2).confidence_interval
    assert found.interval == pytest.approx([theirs.low, theirs.high], abs=0.003), "unpaired it would be 0.2 wide"
    apart = compare(
        scored([1, 0, 1, 1], groups=["x", "x", "y", "y"]), scored([1, 0, 0, 1], groups=["x", "x", "y", "y"])
    )
    assert apart is not None and apart.test == "bootstrap"


def test_the_bootstraps_p_is_near_the_permutation_tests() -> None:
    generator = random.Random(11)
    differences = np.array([generator.gauss(0, 0.5) for _ in range(80)])
    differences += 0.12 - differences.mean()
    draws = scored(differences).drawn["accuracy"]
    theirs = permutation_test(
        (differences, np.zeros(80)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=5000, rng=3
    )
    assert two_sided(draws) == pytest.approx(theirs.pvalue, abs=0.02) and 0.005 < theirs.pvalue < 0.2
    assert two_sided(np.zeros(1000)) == 1


def test_equal_answers_do_not_differ() -> None:
    same = scored(draw(30, 2))
    found = compare(same, scored(draw(30, 2)))
    assert found is not None and (found.difference, found.interval, found.p) == (0, [0, 0], 1)
