"""Keys under their former names: what is told of them, and how settings saved with them are read."""

from __future__ import annotations

import re

import pytest

from mmprune_train import __version__
from mmprune_train.config import renamed
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.docs import all_keys
from mmprune_train.config.explain import unknown_key
from mmprune_train.config.renamed import ADDED, RENAMED, Renamed, former_settings, present_override, upgraded
from mmprune_train.errors import UserError


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every kind: a value, a part that is any, a section."""
    made = {
        "pruner.language.rating": Renamed("pruner.language.score", {"text": "text_attention"}),
        "stage.*.longest": Renamed("stage.*.max_length"),
        "peft.adapters": Renamed("peft"),
    }
    monkeypatch.setattr(renamed, "RENAMED", made)


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("pruner.language.rating=text", "pruner.language.score=text_attention"),
        ("pruner.language.rating=text,random", "pruner.language.score=text_attention,random"),
        ("+pruner.language.rating='choice(text,key_norm)'", "+pruner.language.score='choice(text_attention,key_norm)'"),
        ("~pruner.language.rating", "~pruner.language.score"),
        ("stage.pretrain.longest=5", "stage.pretrain.max_length=5"),
        ("peft.adapters.r=4", "peft.r=4"),
        ("peft.adapters_of=4", None),
        ("pruner.language.ratings=text", None),
        ("generate.question=is pruner.language.rating=text old?", None),
        ("-m", None),
    ],
)
@pytest.mark.usefixtures("rows")
def test_the_override_to_type_is_told(former: str, now: str | None) -> None:
    assert present_override(former) == now


@pytest.mark.usefixtures("rows")
def test_every_former_key_of_a_command_is_told_in_one_line() -> None:
    told = "pruner.language.rating=text is now pruner.language.score=text_attention; peft.adapters.r=4 is now peft.r=4"
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        compose_config(["+experiment=smoke", "pruner.language.rating=text", "seed=1", "peft.adapters.r=4"])


@pytest.mark.usefixtures("rows")
def test_a_mapping_of_the_users_is_answered_as_the_command_line_is() -> None:
    with pytest.raises(
        UserError, match=r"^pruner\.language\.rating=text is now pruner\.language\.score=text_attention$"
    ):
        load_pruner({"name": "fastv", "language": {"rating": "text"}})


@pytest.mark.usefixtures("rows")
def test_where_the_value_is_not_known_those_that_changed_are_told() -> None:
    assert unknown_key("pruner.language.rating") == (
        "pruner.language.rating is now pruner.language.score (text is now text_attention)"
    )


@pytest.mark.usefixtures("rows")
def test_saved_settings_are_read_under_the_names_of_now() -> None:
    saved = {
        "pruner": {"language": {"rating": "text", "min_per_image": 3}},
        "stage": {"third": {"longest": [1, 2], "lr": 1.0}},
        "peft": {"adapters": {"r": 4}, "name": "lora"},
    }
    assert former_settings(saved) == [
        "pruner.language.rating=text", "stage.third.longest=[1,2]", "peft.adapters.r=4",
    ]  # fmt: skip
    assert upgraded(saved) == {
        "pruner": {"language": {"score": "text_attention", "min_per_image": 3}},
        "stage": {"third": {"max_length": [1, 2], "lr": 1.0}},
        "peft": {"name": "lora", "r": 4},
    }
    assert saved["peft"] == {"adapters": {"r": 4}, "name": "lora"}, "not written into"
    assert upgraded(upgraded(saved)) == upgraded(saved)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("odd", [{"stage": 3}, {"pruner": {"language": "all"}}, {"pruner": None, 3: {"x": {}}}, {}])
def test_damaged_settings_are_left_to_the_check_of_all_keys(odd: dict) -> None:
    assert {**upgraded(odd), **odd} == upgraded(odd) or "pruner" not in odd


def test_every_row_leads_from_a_key_that_is_gone_to_one_that_is_there_and_goes_in_time() -> None:
    keys = set(all_keys())
    for former, row in RENAMED.items():
        assert former not in keys, former
        assert row.key in keys or row.key.rpartition(".")[0] in keys, row.key
        assert tuple(map(int, row.until.split("."))) >= tuple(map(int, __version__.split(".")[:2])), (
            f"{former}: its release is over, take the line out"
        )
    assert set(ADDED) <= keys
