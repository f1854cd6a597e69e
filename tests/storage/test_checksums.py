"""Every file of a list is compared, and a list names no file outside its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmprune_train.storage.checksums import LIST, as_checksums, fault_by_list, write_list


def test_every_file_of_a_listed_folder_counts(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "in" / "b").write_bytes(b"def")
    assert fault_by_list(tmp_path) == f"{LIST} is missing"
    write_list(tmp_path)
    assert fault_by_list(tmp_path) is None
    (tmp_path / "in" / "b").write_bytes(b"dEf")
    assert fault_by_list(tmp_path) == "in/b has other bytes than were written"
    (tmp_path / "a").write_bytes(b"ab")
    assert fault_by_list(tmp_path) == "a has 2 of 3 bytes"
    (tmp_path / "a").unlink()
    assert fault_by_list(tmp_path) == "a is missing"
    (tmp_path / LIST).write_text('{"a": {"by')
    assert fault_by_list(tmp_path) == f"{LIST} is damaged"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "in/../../secret", "", "a\0b"])
def test_a_list_names_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file in this folder"):
        as_checksums({name: {"bytes": 1, "crc32": 1}})
    (tmp_path / LIST).write_text(json.dumps({name: {"bytes": 1, "crc32": 1}}))
    assert fault_by_list(tmp_path) == f"{LIST} is damaged"
