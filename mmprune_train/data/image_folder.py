"""The folder that a split's images lie in. A path in an annotation file, which may come from anyone, stays in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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
        remembered; whether the file is itself a link, `refuses` tells when it is read, for that asks the disk."""
        place = self.path / name
        return place, self._outside(_real(str(place.parent)))

    def refuses(self, path: Path) -> str:
        """What is wrong with where a file lies, all links followed; empty where nothing is."""
        return self._outside(os.path.realpath(path))

    def _outside(self, real: str) -> str:
        root = _real(str(self.path))
        if self.outside or os.path.commonpath((root, real)) == root:
            return ""
        return f"leads to {short(real, 500)}, outside of the image folder {self.path}"


@lru_cache(1 << 16)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
