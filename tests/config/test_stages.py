"""Training stages are what the config lists: a third one is a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmprune_train.config.compose import compose_config, config_from, config_from_file, to_yaml
from mmprune_train.config.docs import all_keys
from mmprune_train.config.identity import run_id
from mmprune_train.config.schema import StageConfig
from mmprune_train.errors import UserError
from mmprune_train.tasks import unread

THREE = ["+experiment=smoke", "stage=llava_onevision", "peft=none", "data.midtrain.annotations=middle.json"]


def test_a_stage_group_says_which_stages_run_and_in_which_order() -> None:
    config = compose_config(THREE)
    assert config.stages == list(config.stage) == ["pretrain", "midtrain", "instruct"]
    middle, last = config.stage["midtrain"], config.stage["instruct"]
    assert middle == last and (middle.lr, middle.vision_lr, middle.global_batch_size) == (1e-5, 2e-6, 256)
    first = config.stage["pretrain"]
    assert (first.train_projector, first.train_llm, first.train_vision, first.lr) == (True, False, False, 1e-3)
    assert config.data.part("midtrain").annotations == "middle.json" and config.data.part("midtrain").limit is None
    assert compose_config([*THREE, "stages=[pretrain,instruct]"]).stages == ["pretrain", "instruct"]


def test_a_run_of_three_stages_reads_back_equal_and_its_data_decide_its_name(tmp_path: Path) -> None:
    config = compose_config([*THREE, "data.midtrain.limit=7"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert "\n  midtrain:\n    annotations: middle.json\n" in to_yaml(config)
    assert config_from_file(tmp_path / "config.yaml") == config
    assert run_id(config) != run_id(compose_config(THREE))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*THREE, "stage.midtran.lr=1e-5"], r"stage\.midtran\.lr: .*did you mean stage\.midtrain\.lr\?"),
        ([*THREE, "stage.midtrain.vison_lr=1e-5"], r"did you mean stage\.midtrain\.vision_lr\?"),
        ([*THREE, "stage.midtrain.lr=0"], r"stage\.midtrain\.lr=0\.0 must be more than 0"),
        ([*THREE, "data.midtran.limit=3"], r"data\.midtran: .*did you mean data\.midtrain\?"),
        ([*THREE, "data.midtrain.limt=3"], r"data\.midtrain\.limt: .*did you mean data\.midtrain\.limit\?"),
        ([*THREE, "data.midtrain.limit=0"], r"data\.midtrain\.limit=0 must be at least 1"),
        ([*THREE, "data.midtrain.limit=few"], r"data\.midtrain\.limit: Value 'few'"),
        (THREE[:3], r"data\.midtrain\.annotations is not set, and stage midtrain needs it"),
        ([*THREE, "stages=[midtran]"], r"stages=midtran: .*did you mean midtrain\?"),
        ([*THREE, "stages=[midtrain,pretrain]"], r"must be in order.*: pretrain, midtrain, instruct"),
        ([*THREE, "+stage.last.lr=1e-3"], r"\+stage\.last\.lr=1e-3: .* is written in a YAML file of the stage group"),
        ([*THREE, "task=bench", "bench.stage=midtran"], r"bench\.stage=midtran: .*did you mean midtrain\?"),
        (["+experiment=smoke", "stages=[midtrain]"], r"one of pretrain, instruct\), or choose a stage= that has it"),
        (["+experiment=smoke", "data.midtrain.limit=3"], r"data\.midtrain: there is no such key"),
        (["+experiment=smoke", "task=calibrate", "calibrate.split=midtrain"], r"calibrate\.split=midtrain"),
    ],
)
def test_a_typo_in_a_stage_or_its_data_is_answered_with_the_nearest_name(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose_config(overrides)


@pytest.mark.parametrize("name", ["blind", "root", "part", "bench", "evaluate", "a.b", "x-y", "class"])
def test_a_stage_has_a_name_that_nothing_else_has(name: str) -> None:
    tree = OmegaConf.structured(compose_config(THREE))
    tree.stage[name] = StageConfig()
    with pytest.raises(UserError, match=f"stage.{name}: .*name it otherwise"):
        config_from(tree)


def test_tasks_read_the_data_of_a_further_stage_as_those_of_the_first() -> None:
    assert "data.midtrain.limit" in all_keys(("pretrain", "midtrain", "instruct"))
    for task in ("train", "bench", "calibrate"):
        assert not unread(task, ["data.midtrain.limit=3"])
    assert unread("evaluate", ["ckpt=x", "data.midtrain.limit=3"])
