"""What stopped processes leave in folders is swept, and locks hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mmprune_train
from mmprune_train.errors import UserError
from mmprune_train.storage.atomic import (
    MACHINE,
    delete_leftovers,
    finished_folder,
    remove_damaged,
    temporary_folder,
    whole_folder,
    write_atomically,
)
from mmprune_train.storage.locks import held


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
from mmprune_train.storage.atomic import finished_folder
with finished_folder(Path(sys.argv[1])) as part:
    (part / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Killed(BaseException):
    """Not an Exception: nothing on the way may catch it and tidy up."""


def write_file(path: Path, text: str) -> None:
    write_atomically(path, text * 1000)


def write_folder(path: Path, text: str) -> None:
    with whole_folder(path) as part:
        (part / "in").mkdir()
        (part / "in/file").write_text(text * 1000)


def held_by(path: Path) -> str:
    return (path / "in/file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_kill_at_any_file_operation_leaves_what_is_whole_and_the_next_write_nothing_else(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0

    def mortal(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments, **more)

        return call

    path, killed = tmp_path / "target", 0
    write(path, "old")
    for place, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "write_bytes")):
        monkeypatch.setattr(place, name, mortal(getattr(place, name)))
    for name in ("chmod", "mkdir", "unlink"):
        monkeypatch.setattr(Path, name, mortal(getattr(Path, name)))
    for moment in range(1, 100):
        left = moment
        try:
            write(path, "new")
        except Killed:
            killed += 1
        alive, left = left > 0, 0
        if path.exists():  # a folder is gone for a moment
            assert held_by(path) in ("old" * 1000, "new" * 1000)
        write(path, "old")
        assert held_by(path) == "old" * 1000 and list(tmp_path.iterdir()) == [path]
        if alive:
            break
    assert alive and killed >= 5


def test_one_module_brings_to_disk_and_renames() -> None:
    root = Path(mmprune_train.__file__).parent
    places = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if re.search(r"fsync\(|os\.replace\(", file.read_text())
    }
    assert places == {"storage/atomic.py"}


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "data")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".data.")
    with temporary_folder(tmp_path, "other") as mine:
        delete_leftovers(tmp_path)
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
    delete_leftovers(tmp_path)
    with finished_folder(tmp_path / "data"), temporary_folder(tmp_path, "bench"):
        pass
    assert (tmp_path / name / "kept").is_dir()


@pytest.mark.parametrize("name", ["*", "[a-z]*", "da?a"])
def test_a_folders_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    other = tmp_path / ".data.abcdef01abcdef01.mmprune"
    other.mkdir()
    with finished_folder(tmp_path / name):
        assert other.is_dir()


def test_what_another_machine_makes_is_left_alone_while_it_is_young(tmp_path: Path) -> None:
    mine, others = tmp_path / f".data.{MACHINE}00000000.mmprune", tmp_path / f".data.{0:016x}.mmprune"
    for folder in (mine, others):
        folder.mkdir()
    delete_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [others]
    os.utime(others, (0, 0))
    delete_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_temporary_folder_is_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    inside = tmp_path / "cache"
    inside.mkdir()
    (inside / ".a.abcdef01abcdef01.mmprune").symlink_to(outside)
    (inside / ".b.abcdef01abcdef01.mmprune").touch()
    delete_leftovers(inside)
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
