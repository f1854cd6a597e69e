"""Secrets are used, and neither written nor printed; what only looks like one is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmprune_train.config import masking
from mmprune_train.config.compose import compose_config, config_from_file, to_yaml
from mmprune_train.config.identity import decisive, run_id, sweep_name, without_effect
from mmprune_train.reporting.sweeps import JobRecord
from mmprune_train.storage import secrets
from mmprune_train.storage.files import read_json, write_json
from mmprune_train.storage.secrets import hide, masked, note_arguments, sounds_secret
from mmprune_train.training.rundir import open_run

SMOKE = "+experiment=smoke"


@pytest.fixture(autouse=True)
def unknown() -> Iterator[None]:
    """No secrets of another test."""
    values, given = dict(secrets._values), set(masking._given)
    secrets._values.clear()
    masking._given.clear()
    yield
    secrets._values.clear()
    masking._given.clear()
    secrets._values.update(values)
    masking._given.update(given)


@pytest.mark.parametrize(
    "key",
    [
        "token", "hf_token", "HF_TOKEN", "a.b.api_key", "apikey", "accessToken", "client_secret", "SECRET_VALUE",
        "password", "db.passwd", "wandb_api_key", "private_key", "credentials", "auth",
    ],
)  # fmt: skip
def test_keys_that_sound_secret(key: str) -> None:
    assert sounds_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "token_budget", "num_tokens", "image_token", "image_token_index", "bos_token", "pad_token_id", "max_new_tokens",
        "tokenizer", "min_tokens", "key_norm", "keep", "author", "additional_special_tokens", "tokens_layer_mean",
    ],
)  # fmt: skip
def test_keys_that_do_not(key: str) -> None:
    assert not sounds_secret(key)


@pytest.mark.parametrize(
    "override",
    ["+llm.arch.api_key=VALUE", "data.how_to_get=${oc.env:MY_SECRET}", "data.how_to_get='ask ${oc.env:PLAIN}'",
     "logger.wandb.tags=['${oc.env:PLAIN}']", "logger.wandb.tags=['${oc.env:MY_SECRET}']"],
)  # fmt: skip
def test_a_secret_is_used_and_not_written_and_the_command_goes_on(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = set()
    for value in ("s3cr3t: 'one\"", "an0ther: two"):
        monkeypatch.setenv("MY_SECRET", value)
        monkeypatch.setenv("PLAIN", value)
        quoted = json.dumps(value)
        given = override.replace("VALUE", quoted)
        note_arguments([given])
        config = compose_config([SMOKE, "logger=[csv,wandb]", f"runs_dir={tmp_path}", given])
        assert value in repr(config) or repr(value)[1:-1] in repr(config) or value in str(config.llm.arch)
        assert value.split(":")[0] not in to_yaml(config) and "***" in to_yaml(config)
        directory = open_run(config)  # refuses other settings
        ids.add(directory.path)
        assert without_effect(config_from_file(directory.path / "config.yaml"), config) == []
    assert len(ids) == 1
    assert not [
        file for file in tmp_path.rglob("*") if file.is_file() and re.search("s3cr3t|an0ther", file.read_text())
    ]


def test_paths_names_and_numbers_of_the_environment_are_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for knee, root, seed in (("otsu", "/data", "1"), ("lof", "/data", "2")):
        monkeypatch.setenv("KNEE", knee)
        monkeypatch.setenv("ROOT", root)
        monkeypatch.setenv("SEED", seed)
        config = compose_config(
            [SMOKE, "knee.method=${oc.env:KNEE}", "data.root=${oc.env:ROOT}", "seed=${oc.env:SEED}"]
        )
        text = to_yaml(config)
        assert f"root: {root}" in text and f"method: {knee}" in text and f"seed: {seed}" in text
        found.add(run_id(config))
    assert len(found) == 2


def test_two_configs_of_one_process_are_told_each_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIN", "ask the owner")
    given = compose_config([SMOKE, "data.how_to_get=${oc.env:PLAIN}"])
    alone = run_id(given), to_yaml(given)
    typed = compose_config([SMOKE, "data.how_to_get=here"])
    assert (run_id(given), to_yaml(given)) == alone and "ask the owner" not in alone[1]
    assert "how_to_get: here" in to_yaml(typed), "a text of its own"


def test_keys_of_tokenizers_stay() -> None:
    config = compose_config([SMOKE, "+llm.arch.image_token=xyzimage", "stage.instruct.token_budget=512"])
    assert "image_token: xyzimage" in to_yaml(config) and "token_budget: 512" in to_yaml(config)
    assert decisive(config)["llm.arch.image_token"] == "xyzimage"


def test_what_is_written_is_masked_in_every_notation(tmp_path: Path) -> None:
    value = 'p"ä\n<&'
    hide(value)
    write_json(tmp_path / "a.json", {"error": f"no access with {value}"})
    assert json.loads((tmp_path / "a.json").read_text())["error"] == "no access with ***"
    assert masked("p&quot;ä\n&lt;&amp; " + json.dumps(value)) == '*** "***"'


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("+llm.arch.api_key=sk-1234", "+llm.arch.api_key=***"),
        ("hydra.job.env_set={HF_TOKEN: hf_1234, A: b}", "hydra.job.env_set={HF_TOKEN: ***, A: b}"),
        ("hydra.sweeper.storage=postgresql://me:pw1234@host/db", "hydra.sweeper.storage=postgresql://me:***@host/db"),
        ("stage.instruct.token_budget=1024", "stage.instruct.token_budget=1024"),
    ],
)
def test_a_command_line_and_the_records_of_sweeps(argument: str, shown: str, tmp_path: Path) -> None:
    note_arguments([argument])
    assert masked(argument) == shown
    record = JobRecord(0, [masked(argument)])
    record.write(tmp_path)
    (file,) = (tmp_path / "jobs").iterdir()
    assert JobRecord.read(file).overrides == [shown]


def test_a_sweep_keeps_its_folder_when_the_secret_changes() -> None:
    names = {sweep_name("x", {"hydra/sweeper": "basic"}, [f"+llm.arch.api_key={v}"], None) for v in ("abcd1", "abcd2")}
    assert len(names) == 1


@pytest.mark.parametrize("value", ["true", "True", "1234", "0.5", "demo", "mean", "done", "null", "easy_vqa", "1_000"])
def test_a_secret_that_is_a_word_or_a_number_breaks_nothing(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", value)
    given = [f"+llm.arch.api_key={value}", "data.how_to_get=${oc.env:MY_SECRET}"]
    note_arguments(given)
    config = compose_config(["+experiment=smoke", f"runs_dir={tmp_path}", *given])
    assert config.data.how_to_get == value
    again = config_from_file(open_run(config).path / "config.yaml")
    assert again.data.how_to_get == "***" and again.experiment_name == config.experiment_name
    assert again.data.name == config.data.name and again.trainer == config.trainer
    numbers = {"state": "done", "loss": 0.12345, "tokens": 1234, "on": True, "reduce": "mean", "off": None, "a": 0.5}
    write_json(tmp_path / "a.json", numbers, checked=True)
    assert read_json(tmp_path / "a.json") == numbers
    assert masked(given[0]) == "+llm.arch.api_key=***", "told by its key alone"


def test_a_number_in_json_is_no_secret(tmp_path: Path) -> None:
    hide("123456789012345678")
    write_json(tmp_path / "a.json", {"mtime": 123456789012345678, "said": "key 123456789012345678"}, checked=True)
    assert read_json(tmp_path / "a.json") == {"mtime": 123456789012345678, "said": "key ***"}
