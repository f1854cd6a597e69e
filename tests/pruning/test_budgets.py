"""Budgets against independent references: the kneed package, brute force, and properties that must always hold."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning.references import REFERENCES, kneed_count

from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.pruning import IGNORE, Kind, PackedSequence, Pruner, available_budgets, find_knee
from mmprune_train.pruning.views import VisionView
from mmprune_train.storage.conf import options

DIVIDING = ["cumulative_mass", "attention_entropy"]
KNEES = ["kneedle", "max_chord", "l_method", "menger", "second_difference"]
WIDTH = 6


def long_tails(rows: int, size: int, seed: int) -> torch.Tensor:
    """Rows shaped like sorted CLS attention: softmax of noise of different sharpness, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand((rows, 1), generator=generator) * 4 + 0.1
    return (torch.randn((rows, size), generator=generator, dtype=torch.float64) * sharpness).softmax(-1)


def states(rows: int, size: int, seed: int) -> torch.Tensor:
    """Features [rows, size, WIDTH] of different effective rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand((rows, 1, WIDTH), generator=generator, dtype=torch.float64) ** 4
    return torch.randn((rows, size, WIDTH), generator=generator, dtype=torch.float64) * weight


def ragged(rows: int, size: int, seed: int, shortest: int = 1) -> torch.Tensor:
    return torch.randint(shortest, size + 1, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sensitivity", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("size", [3, 10, 64, 576])
def test_kneedle_agrees_with_the_kneed_package(size: int, sensitivity: float) -> None:
    scores = long_tails(40, size, seed=size)
    counts = find_knee(scores, "kneedle", sensitivity=sensitivity)
    compared = 0
    for row, count in zip(scores, counts, strict=True):
        expected = kneed_count(row.sort(descending=True).values.numpy(), sensitivity)
        if expected != 1:  # the package may take a curve's first point for a knee where it is not convex
            assert count == (size if expected is None else expected)
            compared += 1
    assert compared > 15


def test_kneedle_without_a_knee_keeps_all_or_falls_back_as_told() -> None:
    curve = 0.8 ** torch.arange(20.0, dtype=torch.float64)[None]
    assert kneed_count(curve[0].numpy(), 1000.0) is None  # nothing falls by 1000 steps
    assert find_knee(curve, "kneedle", sensitivity=1000.0) == 20
    fallback = find_knee(curve, "kneedle", sensitivity=1000.0, no_knee="max_chord")
    assert fallback == find_knee(curve, "max_chord") and fallback < 20


@pytest.mark.parametrize("sensitivity", [0.0, 1.0, 5.0])
def test_kneedle_agrees_with_the_kneed_package_on_convex_curves(sensitivity: float) -> None:
    rank = torch.arange(100, dtype=torch.float64)
    curves = torch.stack([1 / (1 + rank), 0.9**rank, (1 - rank / 100) ** 3, (-rank).exp() + 0.1])
    for curve, count in zip(curves, find_knee(curves, "kneedle", sensitivity=sensitivity), strict=True):
        assert count == kneed_count(curve.numpy(), sensitivity)


def test_kneedle_does_not_take_the_first_point_of_a_concave_curve_for_a_knee() -> None:
    curve = torch.linspace(1, 0, 20, dtype=torch.float64) ** 0.5
    assert kneed_count(curve.numpy(), 1.0) == 1  # what the package says, and why we differ
    assert find_knee(curve[None], "kneedle") == 20


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("method", available_budgets())
def test_a_budget_agrees_with_its_slow_reference_on_every_ragged_row(method: str, batch: int) -> None:
    compared = set()
    for size, seed in itertools.product([4, 9, 30, 100], range(5)):
        scores, features = long_tails(batch, size, seed), states(batch, size, seed)
        lengths = ragged(batch, size, seed, shortest=4)
        counts = find_knee(scores, method, lengths, features=features)
        for row, length in enumerate(lengths.tolist()):
            curve = scores[row, :length].sort(descending=True).values.numpy()
            expected = REFERENCES[method](curve, features[row, :length].numpy())
            if expected is not None:
                assert counts[row] == min(max(expected, 1), length), (size, seed, row)
                compared.add(int(counts[row]))
    assert len(compared) > 3


def test_fixed_budgets_round_and_clamp() -> None:
    scores = torch.rand(3, 10)
    lengths = torch.tensor([10, 5, 1])
    assert find_knee(scores, "fixed_ratio", lengths, ratio=0.25).tolist() == [3, 1, 1]
    assert find_knee(scores, "fixed_count", lengths, count=4).tolist() == [4, 4, 1]
    assert find_knee(scores, "fixed_count", lengths, count=1, min_tokens=3).tolist() == [3, 3, 1]
    assert find_knee(scores, "fixed_count", lengths, count=9, max_tokens=2).tolist() == [2, 2, 1]


@pytest.mark.parametrize("method", [*KNEES, "otsu"])
def test_rows_without_a_bend_are_kept_whole(method: str) -> None:
    assert find_knee(torch.full((2, 7), 0.3), method).tolist() == [7, 7]
    assert find_knee(torch.rand(2, 1), method).tolist() == [1, 1]
    if method not in ("otsu", "l_method", "kneedle"):
        assert find_knee(torch.rand(1, 2), method).tolist() == [2]
        assert find_knee(torch.linspace(0, 1, 577, dtype=torch.float64)[None], method).tolist() == [577]


def test_second_difference_looks_for_convex_bends_and_menger_for_any() -> None:
    concave = torch.tensor([[1.0, 0.9, 0.7, 0.0]])
    assert find_knee(concave, "second_difference") == 4
    assert find_knee(concave, "menger") == 3
    step = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    assert find_knee(step, "second_difference") == 4  # the token at the bend is the last one kept
    assert find_knee(step, "menger") == 3  # both corners are as sharp: fewer tokens


def test_otsu_cuts_between_different_scores_and_of_equal_thresholds_takes_the_highest() -> None:
    assert find_knee(torch.tensor([[0.0, 5.0, 5.0, 5.0, 1.0, 1.0]]), "otsu") == 3
    assert find_knee(torch.tensor([[0.0, 1.0, 2.0]]), "otsu") == 1
    assert find_knee(torch.tensor([[2.0, 1.0]]), "otsu") == 1


@pytest.mark.parametrize("method", ["iqr", "lof"])
def test_rows_without_an_outlier_get_the_floor(method: str) -> None:
    even = torch.stack([torch.linspace(0, 1, 30), torch.full((30,), 0.2)])
    assert find_knee(even, method).tolist() == [1, 1]
    assert find_knee(even, method, torch.tensor([30, 2]), min_tokens=5).tolist() == [5, 2]
    assert find_knee(torch.rand(3, 2), method, torch.tensor([1, 2, 2])).tolist() == [1, 1, 1]


def test_outliers_are_counted() -> None:
    row = torch.cat([torch.linspace(0, 1, 40), torch.tensor([50.0, 60.0, 90.0])])[None]
    assert find_knee(row, "iqr") == find_knee(row, "lof") == 3
    assert find_knee(-row, "iqr") == 1  # none above: the floor
    assert find_knee(-row, "lof") == 3  # both ends count, as published
    assert find_knee(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), "iqr") == 1


@pytest.mark.parametrize("size", [1, 2, 7, 576])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
def test_a_constant_row_is_spread_over_all_its_tokens(value: float, size: int) -> None:
    row = torch.full((1, size), value)
    assert find_knee(row, "attention_entropy") == size
    assert find_knee(row, "attention_entropy", scale=0.5) == (size + 1) // 2
    assert find_knee(row, "cumulative_mass", mass=0.5) == (size + 1) // 2
    assert find_knee(row, "cumulative_mass", mass=1.0) == size


def test_effective_rank_of_known_matrices() -> None:
    scores = torch.rand(4, 8)
    equal = torch.ones(8, 5)
    two = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).repeat(4, 1)
    features = torch.stack([equal, two, torch.eye(8)[:, :5], torch.zeros(8, 5)])
    assert find_knee(scores, "effective_rank", features=features).tolist() == [1, 2, 5, 1]
    assert find_knee(scores, "effective_rank", features=features, scale=1.5).tolist() == [2, 3, 8, 2]
    assert find_knee(scores, "effective_rank", torch.tensor([3, 1, 4, 8]), features=features).tolist() == [1, 1, 4, 1]
    wide = torch.eye(4)[None].repeat(1, 1, 9)
    assert find_knee(torch.rand(1, 4), "effective_rank", features=wide.bfloat16()) == 4
    long = torch.ones(1, 300, 300) / 3  # 299 singular values that are 0 up to rounding
    assert find_knee(torch.rand(1, 300), "effective_rank", features=long, scale=1.49999) == 1


def test_padding_may_hold_anything() -> None:
    scores, features, lengths = long_tails(3, 12, 0), states(3, 12, 0), torch.tensor([5, 12, 1])
    padding = torch.arange(12) >= lengths[:, None]
    for method in available_budgets():
        expected = find_knee(scores, method, lengths, features=features)
        dirty = scores.masked_fill(padding, -torch.inf), features.masked_fill(padding[..., None], torch.nan)
        assert find_knee(dirty[0], method, lengths, features=dirty[1]).tolist() == expected.tolist()


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Scores [4, N] with many ties, long tails or constant rows, lengths, features and a seed."""
    size, seed = draw(st.integers(1, 40)), draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["tails", "ties", "constant"]))
    scores = long_tails(4, size, seed)
    if kind == "ties":
        scores = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=4 * size, max_size=4 * size))).double()
        scores = scores.view(4, size)
    if kind == "constant":
        scores = torch.full_like(scores, draw(st.sampled_from([0.0, 0.1, 1.0])))
    return scores, ragged(4, size, seed), states(4, size, seed), seed


@pytest.mark.filterwarnings("ignore:Duplicate values")  # scikit-learn, of ties
@pytest.mark.parametrize("method", available_budgets())
@settings(max_examples=30, deadline=None)
@given(batch=batches(), power=st.integers(-20, 20), floor=st.integers(1, 50), room=st.integers(0, 50))
def test_a_count_ignores_order_scale_and_the_rest_of_the_batch(
    method: str, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], power: int, floor: int, room: int
) -> None:
    scores, lengths, features, seed = batch
    counts = find_knee(scores, method, lengths, features=features)
    assert ((counts >= 1) & (counts <= lengths)).all() and counts.dtype == torch.int64
    bounds = {"min_tokens": floor, "max_tokens": floor + room}
    clamped = find_knee(scores, method, lengths, features=features, **bounds)
    assert clamped.tolist() == counts.clamp(floor, floor + room).minimum(lengths).tolist()
    scaled = find_knee(scores * 2.0**power, method, lengths, features=features * 2.0**power)
    assert scaled.tolist() == counts.tolist()
    for row in range(4):
        order = torch.randperm(int(lengths[row]), generator=torch.Generator().manual_seed(seed))
        assert find_knee(scores[row, order][None], method, features=features[row, order][None]) == counts[row]


@pytest.mark.parametrize("method", available_budgets())
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 40), scale=st.floats(1e-3, 1e3))
def test_a_count_ignores_any_positive_scale_where_no_scores_tie(
    method: str, seed: int, size: int, scale: float
) -> None:
    scores, features = long_tails(2, size, seed), states(2, size, seed)
    counts = find_knee(scores, method, features=features)
    assert find_knee(scores * scale, method, features=features * scale).tolist() == counts.tolist()


@pytest.mark.parametrize("method", ["menger", "second_difference", "otsu", *DIVIDING])
@settings(max_examples=50, deadline=None)
@given(row=st.lists(st.integers(0, 4), min_size=1, max_size=12), scale=st.floats(1e-3, 1e3))
def test_rounding_decides_no_tie(method: str, row: list[int], scale: float) -> None:
    scores = torch.tensor([row], dtype=torch.float64)
    assert find_knee(scores * scale, method) == find_knee(scores, method)


@pytest.mark.parametrize(
    ("method", "name", "sign", "highest"),
    [
        ("fixed_ratio", "ratio", 1, 1.0),
        ("cumulative_mass", "mass", 1, 1.0),
        ("iqr", "factor", -1, 5.0),
        ("attention_entropy", "scale", 1, 3.0),
        ("effective_rank", "scale", 1, 3.0),
    ],
)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), shares=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5))
def test_a_count_is_monotone_in_its_parameter(
    method: str,
    name: str,
    sign: int,
    highest: float,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int],
    shares: list[float],
) -> None:
    scores, lengths, features, _ = batch
    values = [highest * share for share in sorted(shares)]
    counts = [find_knee(scores, method, lengths, features=features, **{name: value}) for value in values]
    for fewer, more in itertools.pairwise(counts[::sign]):
        assert (fewer <= more).all()


def test_every_budget_has_an_option_of_the_group() -> None:
    assert available_budgets() == options("knee")


def test_only_lof_imports_scikit_learn() -> None:
    code = (
        "import sys, torch; from mmprune_train.pruning import available_budgets, find_knee;"
        "rest = [name for name in available_budgets() if name != 'lof'];"
        "[find_knee(torch.rand(2, 9), name, features=torch.rand(2, 9, 3)) for name in rest];"
        "print([name for name in ('sklearn', 'scipy', 'transformers') if name in sys.modules]);"
        "find_knee(torch.rand(2, 9), 'lof'); print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


def test_both_stages_give_effective_rank_the_features_of_their_rows() -> None:
    settings = PrunerConfig()
    for stage in (settings.vision, settings.language):
        stage.score, stage.knee = "random", KneeConfig(method="effective_rank")
    pruner = Pruner(settings)
    patches = torch.stack([torch.ones(8, 5), torch.eye(8)[:, :5]])
    mask, _ = pruner.keep_patches(VisionView(patches, (2, 4), lambda: patches))
    assert mask.sum(1).tolist() == [1, 5]

    kind = torch.tensor([Kind.SPECIAL, *[Kind.VISUAL] * 4, *[Kind.PROMPT] * 3, Kind.SPECIAL] * 2)
    order, none = torch.arange(18), torch.full((18,), -1)
    sequence = PackedSequence(
        order, order, order // 9, kind, none, none, torch.ones_like(order), torch.full((18,), IGNORE), order, 2
    )
    hidden = torch.eye(18)  # every token its own direction
    hidden[10:13] = hidden[13]  # but the second image's patches are all alike
    _, mask, _, _ = pruner.prune_tokens(sequence, hidden, lambda rows: (rows, rows))
    assert [int(mask[kind == Kind.VISUAL][part].sum()) for part in (slice(0, 4), slice(4, 8))] == [4, 1]
    assert mask[kind != Kind.VISUAL].all()


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="find_knee.method=kneedel.*did you mean kneedle"):
        find_knee(torch.rand(1, 4), "kneedel")
    with pytest.raises(UserError, match="kneedle has no parameter ratio"):
        find_knee(torch.rand(1, 4), "kneedle", ratio=0.5)
    with pytest.raises(UserError, match="row 1 holds NaN"):
        find_knee(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]]))
    with pytest.raises(UserError, match="lengths"):
        find_knee(torch.rand(2, 3), lengths=torch.tensor([4, 1]))
    assert find_knee(torch.tensor([[1.0, 2.0, torch.nan]]), "fixed_count", torch.tensor([2]), count=1) == 1


def test_scores_that_have_no_shares_and_features_that_do_not_fit_are_refused() -> None:
    negative = torch.tensor([[0.5, 0.5], [0.9, -0.1]])
    for method in DIVIDING:
        with pytest.raises(UserError, match=r"row 1 is negative.*softmaxed score .pruner.vision.score=cls_attention"):
            find_knee(negative, method)
        assert find_knee(negative, method, torch.tensor([2, 1])).tolist() == [2, 1]  # padding is nobody's score
    scores = torch.rand(2, 3)
    with pytest.raises(UserError, match=r"'effective_rank' needs features=\[2, 3, D\]"):
        find_knee(scores, "effective_rank")
    for shape in [(2, 3), (2, 4, 5), (1, 3, 5), (2, 3, 0)]:
        with pytest.raises(UserError, match=r"features must be \[2, 3, D\]"):
            find_knee(scores, "effective_rank", features=torch.rand(shape))
    features = torch.rand(2, 3, 4)
    features[1, 2, 0] = torch.inf
    with pytest.raises(UserError, match="features row 1"):
        find_knee(scores, "effective_rank", features=features)
    assert find_knee(scores, "effective_rank", torch.tensor([3, 2]), features=features).shape == (2,)
    with pytest.raises(UserError, match="no parameter features_.*its parameters: scale"):
        find_knee(scores, "effective_rank", features_=features)


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("kneedle", {"sensitivity": -1.0}),
        ("kneedle", {"no_knee": "guess"}),
        ("iqr", {"factor": -0.1}),
        ("iqr", {"factor": float("nan")}),
        ("lof", {"neighbors": 0}),
        ("cumulative_mass", {"mass": 0.0}),
        ("cumulative_mass", {"mass": 1.1}),
        ("attention_entropy", {"scale": 0.0}),
        ("effective_rank", {"scale": float("inf")}),
        ("fixed_ratio", {"ratio": 0.0}),
        ("fixed_count", {"count": 0}),
    ],
)
def test_parameters_out_of_range_are_named(method: str, wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.* must be"):
        find_knee(torch.rand(2, 5), method, features=torch.rand(2, 5, 3), **wrong)
