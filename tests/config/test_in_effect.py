"""Settings that mean the same are the same; of former settings each component keeps what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmprune_train.config.compose import compose_config
from mmprune_train.config.identity import differences
from mmprune_train.config.in_effect import as_now


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["pruner=random", "pruner.vision.knee.ratio=0.25"], []),
        (["pruner=random", "pruner.vision.knee.args.ratio=0.25"], []),
        (["pruner=random", "pruner.vision.knee.factor=3"], []),
        (["pruner=random", "pruner.vision.knee.ratio=0.5"], ["pruner.vision.knee.ratio: 0.25 -> 0.5"]),
        (["pruner=random", "pruner.vision.selection=dpp"], ["pruner.vision.selection: top -> dpp"]),
    ],
)
def test_a_parameter_at_its_default_or_of_another_component_makes_no_other_run(
    asked: list[str], told: list[str]
) -> None:
    assert differences(compose_config(["+experiment=smoke", "pruner=random"]), compose_config(
        ["+experiment=smoke", *asked]
    )) == told  # fmt: skip


def saved(**vision: Any) -> dict[str, Any]:
    return {"pruner": {"vision": {"share": 0.3, "merge_count": 8, **vision}}}


@pytest.mark.parametrize(
    ("vision", "selection", "merge"),
    [
        ({"selection": "top", "merge": "none"}, {}, {}),
        ({"selection": "top_and_distinct", "merge": "contextual"}, {"share": 0.3, "drop": 8}, {"count": 8}),
        ({"selection": "kept_before:nearer", "merge": "kept_before:summed"}, {"share": 0.3}, {"weight": 2.0}),
        ({"selection": "kept_before:absent"}, {"share": 0.3}, {"count": 8}),
        ({"selection": "no_such_name"}, {"share": 0.3}, {"count": 8}),
    ],
    ids=["neither takes one", "both", "own", "cannot be read", "gone"],
)
def test_components_keep_those_of_the_former_parameters_that_they_take(
    vision: dict[str, str], selection: dict, merge: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kept_before.py").write_text(
        "raise SystemExit('it must not be run')\n"
        "def nearer(scores, counts, features, share): ...\n"
        "def summed(features, kept, scores, keys, *, weight: float = 2.0): ...\n"
    )
    now = as_now(saved(**vision))["pruner"]["vision"]
    assert (now["selection_args"], now["merge_args"]) == (selection, merge)


def test_a_budget_of_former_settings_keeps_its_own_parameters_alone() -> None:
    knee = {"method": "iqr", "factor": 2.0, "ratio": 0.25, "sensitivity": 1.0, "min_tokens": 3}
    now = as_now(saved(knee=knee))["pruner"]["vision"]["knee"]
    assert {key: value for key, value in now.items() if value is not None} == {
        "method": "iqr", "factor": 2.0, "min_tokens": 3, "args": {},
    }  # fmt: skip


def test_settings_of_now_are_read_as_they_are() -> None:
    now = {"pruner": {"vision": {"selection": "top", "selection_args": {"typo": 1}}, "language": {"min_per_image": 0}}}
    assert as_now(now) == now, "what does not fit is told, not dropped"
