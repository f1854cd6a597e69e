"""Components of the user's own: what they answer is held to what the pruner needs, by the component's name."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from model.test_every_pruner import sample
from tiny import packed, tiny_llava

from mmprune_train.data.batch import collate
from mmprune_train.errors import UserError
from mmprune_train.pruning import find_knee
from mmprune_train.pruning.language_scores import text_attention
from mmprune_train.pruning.selections import top
from mmprune_train.pruning.vision_scores import feature_norm

RATIO = {"method": "fixed_ratio", "ratio": 0.5}


def run(monkeypatch: pytest.MonkeyPatch, part: Any, key: str) -> None:
    """A training pass with `part` as the component at `key`, and another kind of part where it is not."""
    module = ModuleType("my_parts")
    monkeypatch.setattr(module, "part", part, raising=False)
    monkeypatch.setitem(sys.modules, "my_parts", module)
    settings: dict[str, Any] = {
        "name": "twostage",
        "vision": {"knee": {**RATIO}},
        "language": {"layer": 1, "knee": {**RATIO}},
    }
    at, names = settings, key.split(".")[1:]
    for name in names[:-1]:
        at = at.setdefault(name, {})
    at[names[-1]] = "my_parts:part"
    if "recover" in key:
        settings["vision"]["recover"] |= {"enabled": True, "knee": settings["vision"]["recover"].get("knee", {**RATIO})}
    model = packed(tiny_llava(), settings).train()
    batch = collate([sample(0, [(1, 5, 3)]), sample(1, [(2, 4, 2)])])
    model.forward_packed(batch.sequence, batch.pixel_values).loss_sum.backward()


VISION = ("pruner.vision.score", "pruner.vision.recover.score")
BUDGETS = ("pruner.vision.knee.method", "pruner.vision.recover.knee.method", "pruner.language.knee.method")
norm = feature_norm
own = text_attention
GOOD = [
    *((key, norm) for key in VISION),
    ("pruner.language.score", own),
    *((key, lambda curve, lengths: lengths // 2) for key in BUDGETS),
    ("pruner.vision.knee.method", lambda curve, lengths: (lengths * 9).int()),  # bounded by the row, as documented
    ("pruner.vision.selection", lambda scores, counts, features: top(scores, counts, features)),
    ("pruner.vision.merge", lambda features, kept, scores, keys: (2 * features, kept)),
]
BAD = [
    *(
        (key, lambda view: norm(view).mean(1), r"float32 \[\d\] on cpu; wanted is floating .* \[\d, 9\]")
        for key in VISION
    ),
    *((key, lambda view: norm(view).T, r"float32 \[9, \d\]") for key in VISION),
    *((key, lambda view: norm(view).long(), r"int64 \[\d, 9\]") for key in VISION),
    *((key, lambda view: norm(view).tolist(), r"returned list; wanted") for key in VISION),
    *(
        (key, lambda view: norm(view).index_fill(0, torch.tensor([1]), torch.nan), "NaN or .* image 1")
        for key in VISION
    ),
    *((key, lambda view: norm(view).to("meta"), r"on meta; wanted is .* on cpu") for key in VISION),
    (
        "pruner.language.score",
        lambda view: own(view)[:-1],
        r"wanted is floating \[tokens\], one score a token .* \[\d+\]",
    ),
    ("pruner.language.score", lambda view: own(view)[None], r"float32 \[1, \d+\]"),
    ("pruner.language.score", lambda view: own(view) > 0, "bool"),
    ("pruner.language.score", lambda view: own(view) * torch.nan, "scores row 0 holds NaN"),
    *(
        (key, lambda curve, lengths: lengths / 2, r"float32 \[\d+\] on cpu; wanted is integer \[rows\]")
        for key in BUDGETS
    ),
    *((key, lambda curve, lengths: curve > 0, r"bool \[\d+, \d+\]") for key in BUDGETS),
    *((key, lambda curve, lengths: 4, "returned int; wanted") for key in BUDGETS),
    ("pruner.vision.selection", lambda s, c, f: s.topk(3).indices, r"int64 \[3, 3\] on cpu; wanted is a bool mask"),
    ("pruner.vision.selection", lambda s, c, f: top(s, c, f).float(), r"float32 \[3, 9\]"),
    ("pruner.vision.selection", lambda s, c, f: top(s, c, f) & (s < 0), "keeps nothing of row 0"),
    ("pruner.vision.selection", lambda s, c: top(s, c, None), "cannot be called with its 3 arguments"),
    ("pruner.vision.merge", lambda f, k, s, keys: f, r"float32 \[3, 9, 32\] on cpu; wanted are two"),
    ("pruner.vision.merge", lambda f, k, s, keys: (f[:, :4], k), r"float32 \[3, 4, 32\]"),
    ("pruner.vision.merge", lambda f, k, s, keys: (f.double(), k), r"float64 .* wanted is float32 features"),
    ("pruner.vision.merge", lambda f, k, s, keys: (f, k.long()), r"int64 \[3, 9\] on cpu; wanted is a bool mask"),
    ("pruner.vision.merge", lambda f, k, s, keys: (f, k & False), "keeps nothing of image 0"),
    ("pruner.vision.merge", lambda f, k, s, keys: (f / 0, k), "NaN or infinite features for image 0"),
]


@pytest.mark.parametrize(("key", "part"), GOOD, ids=lambda value: value if isinstance(value, str) else "")
def test_answers_that_fit_are_taken(key: str, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    @functools.wraps(part)  # what it takes is looked at
    def seen(*args: Any, **kwargs: Any) -> Any:
        called.append(key)
        return part(*args, **kwargs)

    run(monkeypatch, seen, key)
    assert called


@pytest.mark.parametrize(("key", "part", "told"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_answers_that_do_not_fit_are_named(key: str, part: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"^{key}=my_parts:part.*{told}"):
        run(monkeypatch, part, key)


def test_an_error_inside_a_part_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        run(monkeypatch, lambda view: norm(view) + None, "pruner.vision.score")


def test_find_knee_names_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_parts")
    monkeypatch.setattr(module, "part", lambda curve, lengths: lengths.float(), raising=False)
    monkeypatch.setitem(sys.modules, "my_parts", module)
    with pytest.raises(UserError, match="^find_knee.method=my_parts:part returned float32"):
        find_knee(torch.rand(2, 5), "my_parts:part")
