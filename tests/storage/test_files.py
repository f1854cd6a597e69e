"""Files that are read back: a flipped bit is told, a cut too, an edit with its remedy, and old ones still load."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmprune_train.config.compose import compose_config, config_from_file, to_yaml
from mmprune_train.errors import UserError
from mmprune_train.reporting.runs import read_run
from mmprune_train.storage.files import (
    CHECKSUM,
    check_yaml_files,
    json_text,
    read_json,
    read_yaml,
    rows_of,
    write_json,
    write_yaml,
)

RECORD = {"stages": {"pretrain": {"loss": 0.1}}, "what": "größer", "none": None}


def flips(path: Path) -> Any:
    """The file with every third of its bits flipped in turn."""
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield
    path.write_bytes(whole)


def test_no_flipped_bit_changes_what_a_json_file_says(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    write_json(file, RECORD, checked=True)
    assert read_json(file) == RECORD
    told = 0
    for _ in flips(file):
        try:
            found = read_json(file)
        except UserError as error:
            told += str(error).startswith(str(file)) and len(str(error).splitlines()) == 1
        else:  # of the key that names the checksum itself nothing depends
            assert found is not None and RECORD.items() <= found.items()
    assert told > 7 * len(file.read_bytes()) / 3, "a flip beside the checksum's own name is an error"


def test_no_flipped_or_cut_byte_changes_what_a_yaml_file_says(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = "seed: 1\nstage: {lr: 1e-3}\n"
    write_yaml(file, text)
    for _ in flips(file):
        with suppress(UserError):
            assert read_yaml(file).endswith(text)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"config\.yaml"):
            read_yaml(file)


def test_a_meant_change_is_made_by_taking_the_checksum_out(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_json(file, RECORD, checked=True)
    edited = json.loads(file.read_text()) | {"what": "by hand"}
    file.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=f'delete its "{CHECKSUM}" if you meant'):
        read_json(file)
    file.write_text(json.dumps({key: value for key, value in edited.items() if key != CHECKSUM}))
    assert read_json(file) == RECORD | {"what": "by hand"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_json_has_null_for_what_it_has_no_word_for(value: float, tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = {"loss": value, "parts": [1, (value, 2.5)], "deep": {"a": {"b": value}}, "word": "NaN", "yes": True}
    wanted = {"loss": None, "parts": [1, [None, 2.5]], "deep": {"a": {"b": None}}, "word": "NaN", "yes": True}
    write_json(tmp_path / "result.json", found)
    for text in ((tmp_path / "result.json").read_text(), json_text(found)):
        assert json.loads(text, parse_constant=refuse) == wanted


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": NaN', "\xff", "[" * 100_000], ids=lambda c: c[:9])
def test_what_is_no_object_is_told_with_the_file_and_the_remedy(content: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"sweep\.json: .*; start it again$"):
        read_json(file, "start it again")


def test_a_config_that_was_edited_or_is_damaged_is_told(tmp_path: Path) -> None:
    config, file = compose_config(["+experiment=smoke"]), tmp_path / "config.yaml"
    write_yaml(file, to_yaml(config))
    assert config_from_file(file) == config
    file.write_text(file.read_text().replace("seed: 42", "seed: 43"))
    with pytest.raises(UserError, match=r"config\.yaml: .*delete its first line"):
        config_from_file(file)
    file.write_text(file.read_text().split("\n", 1)[1])
    assert config_from_file(file).seed == 43, "as of a version without checksums, or a meant change"
    for content, what in (
        ("", "empty"),
        ("# checks", "empty"),
        ("seed: [1", "not YAML"),
        ("- 1\n", "config.yaml"),
        ("word", "config.yaml"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=what):
            config_from_file(file)


def rows(*numbers: int) -> str:
    return "".join(json.dumps({"step": n}) + "\n" for n in numbers)


def middle(text: str) -> str:
    return text.replace('{"step": 2}', '{"step": 2')


@pytest.mark.parametrize("harm", [middle, lambda text: text.replace('"step": 2', '"st\\u0000')], ids=["cut", "word"])
def test_a_bad_line_in_the_middle_of_the_metrics_is_an_error_and_a_torn_last_one_is_not(
    harm: Callable[[str], str], tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(harm(rows(1, 2, 3)))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        list(rows_of(file))
    file.write_text(rows(1, 2) + '{"step": 3')
    assert [row["step"] for row in rows_of(file)] == [1, 2]
    file.write_text(rows(1) + '{"step": 3\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        list(rows_of(file))


def test_of_a_folder_of_options_those_with_a_checksum_are_checked_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "pruner").mkdir()
    ours = tmp_path / "pruner/mine.yaml"
    write_yaml(ours, "name: mine\n")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "comment.yaml").write_text("# nothing chosen yet\n")
    (tmp_path / "latin.yaml").write_bytes("name: größe\n".encode("latin-1"))
    check_yaml_files(tmp_path)
    whole = ours.read_text()
    for harmed in (whole.replace("mine", "mind"), whole[:8], whole.split("\n")[0]):
        ours.write_text(harmed)
        with pytest.raises(UserError, match=r"mine\.yaml"):
            check_yaml_files(tmp_path)


def test_a_config_that_grows_without_end_is_not_read(tmp_path: Path) -> None:
    text = to_yaml(compose_config(["+experiment=smoke", "data.how_to_get='*see* & ask'"]))
    (tmp_path / "config.yaml").write_text(text)
    assert config_from_file(tmp_path / "config.yaml").data.how_to_get == "*see* & ask"
    bomb = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    (tmp_path / "config.yaml").write_text(f"{text}a0: &a0 [x, x]\n{bomb}")
    with pytest.raises(UserError, match=r"config.yaml: it has references \(\*name\)"):
        config_from_file(tmp_path / "config.yaml")
    run = read_run(tmp_path)
    assert run.state == "damaged" and "it has references" in run.missing[0]


@pytest.mark.parametrize("line", ["z: " + "[" * 600 + "]" * 600, "seed: " + "9" * 5000])
def test_lists_and_numbers_without_end_are_damage(line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(line)
    with pytest.raises(UserError, match=r"config.yaml: it is damaged, not YAML of settings .*put an earlier copy back"):
        config_from_file(tmp_path / "config.yaml")
    assert read_run(tmp_path).state == "damaged"
