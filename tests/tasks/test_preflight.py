"""What would end a run in its second stage, or in its evaluation, ends it before the first; nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.tasks import preflight, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage.instruct.max_length=60", "id i0.: its .* tokens exceed max_length=60, and the cut goes"),
        ("stage.instruct.token_budget=60", "exceed the stage's token_budget=60"),
        ("stage.instruct.template=plain", "plain"),
        ("stage.instruct.global_batch_size=64", "global_batch_size=64 is more than the 18 samples of data.instruct"),
        ("data.pretrain.limit=1", "is more than the 1 samples of data.pretrain, data.pretrain.limit=1"),
        ("peft.target_modules=[q_proj,qproj]", "peft.target_modules: this LLM has no qproj; it has .*q_proj"),
        ("evaluate.kinds=[color]", "evaluate.kinds: the file has no question of kind color; it has open, yes_no"),
        ("data.evaluate.annotations=none.json", "data.evaluate.annotations: .*none.json is missing"),
        ("logger.wandb.mode=online", "logger.wandb.mode=online: no account is set up here; .*mode=offline"),
        ("trainer.num_workers=42", "trainer.num_workers=42: too many processes .*; set 8 or less"),
        ("trainer.num_workers=9", "trainer.num_workers=9: too many processes .*; set 8 or less"),
        ("llm.arch.hidden_act=foo", "llm.arch.hidden_act='foo'"),
        ("llm.arch.vocab_size=100000000000000", "must be a whole number"),
        ("pruner.vision.score=no_module:score", "there is no module no_module"),
    ],
)
def test_what_is_wrong_later_is_told_before_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=words) as caught:
        train.run(compose_config([*overrides(root, tmp_path / "runs"), "logger=[csv,wandb]", override]))
    assert len(str(caught.value).splitlines()) <= 3
    assert not list(tmp_path.glob("runs/smoke/*")), "nothing is left behind"


def test_room_for_the_models_is_looked_for(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config(overrides(root, tmp_path / "runs"))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=f"runs_dir: {tmp_path} has 0.0 GiB left, .*make room, or set runs_dir="):
        preflight.check_inputs(config, ["pretrain", "instruct"], False)
    monkeypatch.undo()
    config.llm.arch["vocab_size"] = 10**8
    with pytest.raises(UserError, match="llm.arch describes a network for which this machine has no memory"):
        preflight.check_inputs(config, ["pretrain", "instruct"], False)
    preflight.check_inputs(config, [], False)
