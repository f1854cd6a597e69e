"""Folders are known by their lists, which name their own files alone; what stopped processes leave is swept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmprune_train.errors import UserError
from mmprune_train.folders import (
    LIST,
    as_marks,
    fault_by_list,
    finished_folder,
    held,
    remove_damaged,
    sweep,
    temporary_folder,
    whole_folder,
    write_list,
)


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
        as_marks({name: {"bytes": 1, "crc32": 1}})
    (tmp_path / LIST).write_text(json.dumps({name: {"bytes": 1, "crc32": 1}}))
    assert fault_by_list(tmp_path) == f"{LIST} is damaged"


@pytest.mark.parametrize("umask", [0o002, 0o027])
@pytest.mark.parametrize("make", [whole_folder, finished_folder])
def test_files_of_a_new_folder_have_the_mode_of_the_umask(make: Any, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with make(tmp_path / "new") as part:
            (part / "inside").mkdir()
            save_file({"a": torch.ones(1)}, part / "inside" / "model.safetensors")
            (part / "config.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "new", *(tmp_path / "new").rglob("*"))}
    assert modes == {True: 0o777 & ~umask, False: 0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*") if path.is_file()} == {0o666 & ~umask}


KILLED = """
import os, sys, signal
from pathlib import Path
from mmprune_train.folders import finished_folder
with finished_folder(Path(sys.argv[1])) as part:
    (part / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "data")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".data.")
    with temporary_folder(tmp_path, "other") as mine:
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [mine]
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "data")], check=False)
    with finished_folder(tmp_path / "data") as part:
        assert list(tmp_path.iterdir()) == [part], "the next who makes the same folder sweeps, too"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "name",
    [".git", ".ssh", ".data.settings", ".data.20241128", ".data.backup01", ".bench.old", ".wheel.d", ".data.tmp"],
)
def test_hidden_folders_of_others_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name / "kept").mkdir(parents=True)
    sweep(tmp_path)
    with finished_folder(tmp_path / "data"), temporary_folder(tmp_path, "bench"):
        pass
    assert (tmp_path / name / "kept").is_dir()


@pytest.mark.parametrize("name", ["*", "[a-z]*", "da?a"])
def test_a_folders_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    other = tmp_path / ".data.abcdef01.mmprune"
    other.mkdir()
    with finished_folder(tmp_path / name):
        assert other.is_dir()


def test_what_is_no_temporary_folder_is_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    inside = tmp_path / "cache"
    inside.mkdir()
    (inside / ".a.abcdef01.mmprune").symlink_to(outside)
    (inside / ".b.abcdef01.mmprune").touch()
    sweep(inside)
    assert (outside / "kept").is_dir() and len(list(inside.iterdir())) == 2


def test_two_who_find_the_same_damage_do_not_stand_in_each_others_way(tmp_path: Path) -> None:
    (tmp_path / "data/in").mkdir(parents=True)
    (tmp_path / "data/in/a").touch()
    for _ in range(2):
        remove_damaged(tmp_path / "data")
        assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data is damaged and cannot be deleted \(Not a directory\); delete it"):
        remove_damaged(tmp_path / "file/data")


def test_a_lock_is_anothers_or_shared(tmp_path: Path) -> None:
    with held(tmp_path) as mine, held(tmp_path) as second:
        assert mine is True and second is False
    with held(tmp_path, together=True), held(tmp_path, together=True) as second, held(tmp_path) as alone:
        assert second is True and alone is False
