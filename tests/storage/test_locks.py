"""A `runs_dir` that several users share: whoever comes first leaves nothing that shuts the others out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmprune_train.config.explain import user_mistake
from mmprune_train.errors import UserError
from mmprune_train.storage.atomic import delete_leftovers, finished_folder
from mmprune_train.storage.files import write_json
from mmprune_train.storage.locks import alone_in

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp: everyone may write there, and rename and delete what is their own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_two_users_train_in_one_runs_dir(shared: Path) -> None:
    with alone_in(shared / "smoke/a"):
        pass
    with another_user(), alone_in(shared / "smoke/b"):
        pass
    (shared / ".locks").chmod(0o644)
    with another_user(), pytest.raises(UserError, match=r"runs_dir: .*\.locks cannot be written to .*; make it so"):
        alone_in(shared / "smoke/c").__enter__()


def test_what_another_user_owns_is_told_not_raised(shared: Path) -> None:
    (shared / "smoke").mkdir(mode=0o755)
    with another_user(), pytest.raises(OSError) as caught:
        write_json(shared / "smoke/run/manifest.json", {})
    told = user_mistake(caught.value)
    assert told is not None and told.startswith(f"{shared}/smoke/run: Permission denied; ") and "runs_dir=" in told


def test_another_users_leftovers_stand_in_nobodys_way(shared: Path) -> None:
    (shared / ".data.abcdef01abcdef01.mmprune").mkdir(mode=0o700)
    run = shared / "run"
    run.mkdir()
    run.chmod(0o777)
    (run / ".result.json.tmp").touch(0o600)
    with another_user():
        delete_leftovers(shared)
        with finished_folder(shared / "data") as part:
            (part / "x").touch()
        write_json(run / "result.json", {})
    assert (shared / "data/x").stat().st_mode & 0o044 == 0o044 and (shared / "data").stat().st_mode & 0o055 == 0o055
    assert (run / "result.json").stat().st_uid == NOBODY and not (run / ".result.json.tmp").exists()
