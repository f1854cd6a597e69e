"""A run's identity follows what is trained, and nothing else."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mmprune_train.__main__ import main
from mmprune_train.config.compose import to_yaml
from mmprune_train.config.docs import all_keys
from mmprune_train.config.identity import NOT_DECISIVE, differences, home_dir, run_dir, run_id, run_of


@pytest.mark.parametrize(
    "override",
    [
        "task=evaluate", "stages=[pretrain]", "logger=wandb", "debug=true", "restart=true", "runs_dir=elsewhere",
        "trainer.num_workers=2", "evaluate.limit=3", "generate.question=why", "ckpt=x", "data.root=/elsewhere",
        "trainer.attention=sdpa_per_sample", "trainer.logits_chunk=9",
        "trainer.feature_cache=true", "trainer.feature_cache_dir=/elsewhere",
        "trainer.save_every_minutes=2.5", "trainer.checkpoint_every_steps=null", "trainer.keep_best=true",
    ],
)  # fmt: skip
def test_settings_that_do_not_change_the_training_keep_the_run(smoke, override):
    assert run_id(smoke(override)) == run_id(smoke())


@pytest.mark.parametrize(
    "override",
    ["seed=1", "knee=max_chord", "pruner=none", "stage.instruct.lr=0.1", "peft=none", "trainer.precision=fp32",
     "data.instruct.limit=9", "optim.warmup_ratio=0.1", "data.exif_orientation=false",
     "pruner.vision.knee.min_tokens=2"],
)  # fmt: skip
def test_settings_that_change_the_training_make_another_run(smoke, override):
    assert run_id(smoke(override)) != run_id(smoke())


def test_directory_has_the_experiment_and_the_given_or_hashed_id(smoke):
    config = smoke("runs_dir=out")
    assert run_dir(config) == Path("out/smoke") / run_id(config)
    assert len(run_id(config)) == 8
    int(run_id(config), 16)
    assert run_dir(dataclasses.replace(config, run_id="mine")) == Path("out/smoke/mine")


def test_differences_name_the_keys_and_read_a_written_config(smoke):
    old = yaml.safe_load(to_yaml(smoke()))
    new = smoke("seed=7", "stage.instruct.lr=0.1", "debug=true")
    assert differences(old, new) == ["seed: 42 -> 7", "stage.instruct.lr: 0.001 -> 0.1"]
    assert differences(old, smoke()) == []


def test_a_run_is_found_by_any_of_its_folders_and_no_other_folder_is_one(smoke, tmp_path):
    for folder in ("run/instruct/model", "run/evaluate", "llava/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run/manifest.json").write_text("{}")
    for part in ("run", "run/instruct", "run/instruct/model"):
        assert home_dir(smoke(f"ckpt={tmp_path / part}")) == tmp_path / "run"
    for part in ("run/evaluate", "llava", "llava/model", "absent"):
        assert run_of(str(tmp_path / part)) is None
    assert run_of(None) is None


def test_the_list_of_exceptions_holds_no_stale_key():
    assert set(all_keys()) >= NOT_DECISIVE


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["+experiment=smoke"], "the same command (without restart=true) continues it"),
        (["task=train"], "the same command (without restart=true) continues it"),
        (["-m", "task=evaluate"], "the same command (without restart=true) continues it"),
        (["task=evaluate", "ckpt=x"], "the same command (without restart=true) continues it"),
        (["task=plan"], "the same command starts it again"),
    ],
)
def test_an_interruption_says_what_the_same_command_does(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["mmprune", *arguments])
    monkeypatch.setattr("mmprune_train.__main__.compose_and_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and capsys.readouterr().err == f"interrupted; {told}\n"
