"""Merges against slow, one-image-at-a-time re-derivations of the papers' rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmprune_train.pruning.merging import MERGES, contextual, mean_token, nearest, prumerge

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def case(images: int, size: int = 14) -> Case:
    generator = torch.Generator().manual_seed(images)
    scores = torch.randn((images, size), generator=generator).softmax(1)
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
def test_contextual(images: int, count: int) -> None:
    features, kept, _scores, keys = given = case(images)
    found, mask = contextual(*given, count=count)
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
    features, kept, scores, keys = case(1)
    features.requires_grad_()
    found, mask = MERGES[name](features, kept, scores, keys)
    found[mask].square().sum().backward()
    assert bool((features.grad[~kept].abs().sum(-1) > 0).any())
