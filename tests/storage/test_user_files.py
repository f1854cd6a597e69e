"""What a user names is looked at before it is read, and any text is JSON or is told not to be."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mmprune_train.data.records import read_annotations
from mmprune_train.errors import UserError
from mmprune_train.model.weights.files import check_small_files, tensors_of
from mmprune_train.storage.files import read_json
from mmprune_train.storage.user_files import BadJson, file_status, parse_json, reason_of, short


def test_what_is_no_file_is_told_by_its_kind_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    kinds = {
        "pipe": "a pipe, not", "zero": "a device, not", "socket": "a socket, not", ".": "a folder, not",
        "a\0b": "no file has such a path", "\ud83d": "No such file|no file has", "none": "No such file",
        "x" * 300: "name too long",
    }  # fmt: skip
    for name, told in kinds.items():
        with pytest.raises(OSError) as caught:
            file_status(tmp_path / name)
        assert any(part in reason_of(caught.value) for part in told.split("|")), (name, caught.value)
    listener.close()
    (tmp_path / "text").write_text("four")
    (tmp_path / "link").symlink_to("text")
    assert file_status(tmp_path / "link").st_size == 4


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "[" + "9" * 5000 + "]", '{"a": -' + "1" * 5000 + "}"]
)
def test_json_without_end_is_refused_in_a_few_words(text: str) -> None:
    for strict in (False, True):
        with pytest.raises(BadJson) as caught:
            parse_json(text, strict)
        assert len(str(caught.value)) < 200 and "set_int_max" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[NaN]", '{"a": -Infinity}', '{"a": 1, "a": 2}', '[{"id": "\\ud800", "\\ud800": 1, "\\ud800": 2}]']
)
def test_strict_json_has_numbers_and_every_key_once(text: str) -> None:
    parse_json(text)
    with pytest.raises(BadJson) as caught:
        parse_json(text, strict=True)
    str(caught.value).encode()


def test_a_short_text_can_be_printed_and_is_short() -> None:
    assert short("\ud800") == "\\ud800" and short("a\n\r\u2028b") == "a\\n\\r\\u2028b"
    assert len(short("a" * 10**6)) == 200 and short("a" * 200) == "a" * 200


def test_a_file_of_holes_is_not_read(tmp_path: Path) -> None:
    for file in (tmp_path / "manifest.json", tmp_path / "data.json", tmp_path / "data.jsonl", tmp_path / "config.json"):
        with file.open("wb") as made:
            made.truncate(1 << 40)
    with pytest.raises(UserError, match=r"manifest.json cannot be read \(it has 1,[0-9,]+ bytes, at most"):
        read_json(tmp_path / "manifest.json")
    for name in ("data.json", "data.jsonl"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(it has 1,[0-9,]+ bytes, at most"):
            read_annotations(tmp_path / name, tmp_path)
    with pytest.raises(UserError, match=r"llm.path: .*config.json has 1,[0-9,]+ bytes, at most"):
        check_small_files("llm.path", tmp_path)
    os.truncate(tmp_path / "data.jsonl", 1 << 32)
    with pytest.raises(UserError, match=r"data.jsonl: cannot be read \(it holds NUL bytes, as no text does\)"):
        read_annotations(tmp_path / "data.jsonl", tmp_path)


def test_weights_with_a_header_without_end_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((1 << 39).to_bytes(8, "little"))
    os.truncate(file, 1 << 40)
    with pytest.raises(UserError, match="is damaged or cut off"):
        tensors_of("llm.path", file)
