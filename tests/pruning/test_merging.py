"""Merges against slow, one-image-at-a-time re-derivations of the papers' rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loaded import MERGES
from torch import Tensor

from mmprune_train.pruning.merging import centres, contextual, mean_token, nearest, prumerge

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def case(images: int, size: int = 14) -> Case:
    generator = torch.Generator().manual_seed(images)
    scores = (2 * torch.randn((images, size), generator=generator)).softmax(1)
    counts = torch.randint(1, size, (images, 1), generator=generator)
    kept = scores.argsort(1, descending=True).argsort(1) < counts
    features = torch.randn((images, size, 5), generator=generator)
    return features, kept, scores, torch.randn((images, size, 7), generator=generator)


def most_alike(keys: Tensor, token: int, among: list[int]) -> int:
    return max(among, key=lambda j: float(torch.cosine_similarity(keys[token], keys[j], 0)))


def split(kept: Tensor) -> tuple[list[int], list[int]]:
    return kept.nonzero().squeeze(1).tolist(), (~kept).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("images", [1, 5])
def test_nearest(images: int) -> None:
    features, kept, _scores, keys = given = case(images)
    found, mask = nearest(*given)
    assert torch.equal(mask, kept)
    for image in range(images):
        stay, gone = split(kept[image])
        homes = {j: most_alike(keys[image], j, stay) for j in gone}
        for i in stay:
            members = [i, *(j for j in gone if homes[j] == i)]
            torch.testing.assert_close(found[image, i], features[image, members].mean(0))


@pytest.mark.parametrize("images", [1, 5])
def test_mean_token(images: int) -> None:
    features, kept, scores, _keys = given = case(images)
    found, mask = mean_token(*given)
    for image in range(images):
        stay, gone = split(kept[image])
        place = max(gone, key=lambda j: float(scores[image, j]))
        assert split(mask[image])[0] == sorted([*stay, place])
        torch.testing.assert_close(found[image, place], features[image, gone].mean(0))
        assert torch.equal(found[image, stay], features[image, stay])


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("neighbours", [4, 32])
def test_prumerge(images: int, neighbours: int) -> None:
    features, kept, scores, keys = given = case(images)
    found, mask = prumerge(*given, count=neighbours)
    for image in range(images):
        stay, gone = split(kept[image])
        for i in stay:
            others = [j for j in range(features.shape[1]) if j != i]
            others.sort(key=lambda j: -float(torch.cosine_similarity(keys[image, i], keys[image, j], 0)))
            near = others[:neighbours]
            expected = features[image, i] + sum(scores[image, j] * features[image, j] for j in near)
            torch.testing.assert_close(found[image, i], expected)
        place = max(gone, key=lambda j: float(scores[image, j]))
        assert split(mask[image])[0] == sorted([*stay, place])
        torch.testing.assert_close(found[image, place], sum(scores[image, j] * features[image, j] for j in gone))


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("heads", [1, 2])
def test_contextual(images: int, count: int, heads: int) -> None:
    features, kept, scores, keys = case(images)
    keys = torch.cat([keys, keys.flip(0, 1)[..., : 8 - keys.shape[2]]], 2)
    found, mask = contextual(features, kept, scores, keys, heads, count=count)
    keys = torch.stack(keys.split(8 // heads, 2)).mean(0)
    for image in range(images):
        stay, gone = split(kept[image])
        targets = gone[:: max(1, len(gone) // count)][:count]
        homes = {j: most_alike(keys[image], j, targets) for j in gone if j not in targets}
        assert split(mask[image])[0] == sorted([*stay, *targets])
        for target in targets:
            members = [j for j, home in homes.items() if home == target]
            expected = features[image, target] + (features[image, members].mean(0) if members else 0)
            torch.testing.assert_close(found[image, target], expected)
        assert torch.equal(found[image, stay], features[image, stay])


def outlying(scores: list[float], neighbours: int) -> int:
    """How many of these have a local outlier factor (Breunig et al. 2000) above 1.5, after scaling to 0..1."""
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    if high <= low:
        return 0
    x = [(score - low) / (high - low) for score in scores]
    count = min(neighbours, len(x) - 1)
    near = [sorted((j for j in range(len(x)) if j != i), key=lambda j: abs(x[i] - x[j]))[:count] for i in range(len(x))]
    reach = [abs(x[i] - x[near[i][-1]]) for i in range(len(x))]
    density = [1 / (sum(max(reach[j], abs(x[i] - x[j])) for j in near[i]) / count + 1e-10) for i in range(len(x))]
    factors = [sum(density[j] for j in near[i]) / count / density[i] for i in range(len(x))]
    return sum(factor > 1.5 for factor in factors)


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize(("neighbours", "theirs"), [(4, False), (32, False), (4, True)])
def test_centres(images: int, neighbours: int, theirs: bool, with_text: bool) -> None:
    """By our reading of the paper, and as its authors' code counts centres and finds keys."""
    features, _kept, scores, keys = case(images, size=40)
    kept = scores.argsort(1, descending=True).argsort(1) < torch.tensor([12, 4, 30, 40, 1])[:images, None]
    text = torch.randn(scores.shape) if with_text else None
    reading = {"share_of": "width", "keys_of": "renumbered", "joint": 16} if theirs else {}
    features = torch.cat([features] * 4, 2)  # 20 numbers
    found, mask = centres(features, kept, scores, keys, text, count=neighbours, **reading)
    made = []
    for image in range(images):
        stay, gone = split(kept[image])
        s = scores[image]
        gone.sort(key=lambda j: -float(s[j]))
        key = dict(zip(sorted(gone), keys[image], strict=False)) if theirs else keys[image]
        whole = 20 if theirs else len(stay)
        count = whole * outlying([float(s[j]) for j in gone], 10) // max(1, len(gone))
        middle, others = gone[:count], gone[count:]
        expected = {i: features[image, i] for i in stay}
        for i in middle:

            def nearness(j: int, i: int = i, image: int = image, key: Any = key) -> float:
                alike = float(torch.cosine_similarity(key[i], key[j], 0))
                return alike + (
                    50 / (16 if theirs else 768) ** 0.5 * float(text[image, j]) if text is not None else 0.0
                )

            near = sorted((j for j in gone if j != i), key=nearness, reverse=True)[:neighbours]
            expected[i] = features[image, i] + sum(s[j] * features[image, j] for j in near)
        if middle and others:
            expected[others[0]] = sum(s[j] * features[image, j] for j in others)
        made.append(len(middle))
        assert split(mask[image])[0] == sorted(expected)
        for i, value in expected.items():
            torch.testing.assert_close(found[image, i], value, rtol=1e-4, atol=1e-6)
    assert any(made), "no image had a centre"


@pytest.mark.parametrize("name", sorted(MERGES))
def test_an_image_kept_whole_gains_no_token_and_other_images_do_not_matter(name: str) -> None:
    features, kept, scores, keys = case(5)
    kept[2] = True
    together, mask = MERGES[name](features, kept, scores, keys)
    assert bool(mask[2].all())
    for image in range(5):
        part = slice(image, image + 1)
        alone, alone_mask = MERGES[name](features[part], kept[part], scores[part], keys[part])
        assert torch.equal(mask[image], alone_mask[0])
        torch.testing.assert_close(together[image][mask[image]], alone[0][alone_mask[0]])


@pytest.mark.parametrize("name", sorted(MERGES))
def test_dropped_patches_get_gradients_through_what_they_leave_behind(name: str) -> None:
    features, kept, scores, keys = case(1, size=40)
    features.requires_grad_()
    found, mask = MERGES[name](features, kept, scores, keys)
    found[mask].square().sum().backward()
    assert bool((features.grad[~kept].abs().sum(-1) > 0).any())
