"""The folder that a split's images lie in. A path in an annotation file, which may come from anyone, stays in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mmprune_train.errors import UserError
from mmprune_train.storage.user_files import short

OUTSIDE_REMEDY = "correct it, or if it is meant set data.outside_images=true (docs/data.md)"


@dataclass(frozen=True)
class ImageFolder:
    """Where the image paths of an annotation file start from."""

    path: Path
    outside: bool = False
    """Whether they may lead out of it: absolute paths, `..`, links."""

    def place(self, name: str) -> tuple[Path, str]:
        """Where an image lies, and what is wrong with that: empty where nothing is. Links of folders are followed, and
        remembered; whether the file is itself a link, `check` asks the disk when it is read."""
        place = self.path / name
        return place, self._outside(_real(str(place.parent)))

    def check(self, path: Path, asked_by: str) -> None:
        """Raise UserError for a file that does not lie in it, all links followed; `asked_by` is named, if not empty."""
        if fault := self._outside(os.path.realpath(path)):
            raise UserError(f"{asked_by and f'{asked_by}: '}image {short(str(path), 500)} {fault}; {OUTSIDE_REMEDY}")

    def _outside(self, real: str) -> str:
        root = _real(str(self.path))
        if self.outside or os.path.commonpath((root, real)) == root:
            return ""
        return f"leads to {short(real, 500)}, outside of the image folder {self.path}"


@lru_cache(1 << 16)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
