"""What a record holds beyond the format: harmless metadata, or a picture that nobody would read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

EXTENSIONS = (
    "png|jpe?g|jpe|jfif|gif|bmp|webp|tiff?|heic|heif|avif|svg|ico|ppm|pgm|pbm|jp2|exr|dng|cr2|nef|psd|dcm|nii|npy|npz|ply|pcd|"
    "mp4|m4v|mov|avi|mkv|webm|flv|wmv|mpe?g|3gp|ogv|wav|mp3|flac|ogg|opus|m4a|aac|wma"
)
_FILE = re.compile(rf"[^\n]{{1,300}}\.(?:{EXTENSIONS})(?:\.gz)?", re.IGNORECASE)
_DATA = re.compile(r"\s*(?i:data:(?:image|video|audio)/)|(?:/9j/|iVBORw0KGgo|R0lGOD[dl]|UklGR)[\w+/\s]{32}")
"""A picture itself: a `data:` address, or the base64 of a JPEG, a PNG, a GIF or a WebP."""
_TEXT = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".parquet", ".arrow", ".yaml", ".yml", ".html", ".xml")
"""Of files that tell where a sample is from."""
_URL = re.compile(r"[a-z][a-z0-9+]*://", re.IGNORECASE)

_MEDIUM = r"(?!(?:num|n|no|max|min|total|has|is)_)(?:\w+_)?"
_MEDIUM += r"(?:image|img|picture|pic|photo|screenshot|pixel|frame|video|audio|sound)s?"
_HOLDS = re.compile(
    rf"{_MEDIUM}(?:_?(?:\d+|file|path|url|uri|link|src|location|ref|b64|base64|byte|str|string|data|list|value|"
    rf"content|input|encoded|tensor|array|folder|dir)s?)*(?:_[a-d])?|(?:{EXTENSIONS})"
)
"""Keys that hold pictures, videos or sounds, whatever their values: `images`, `image_path`, `imgB64`, `jpg`."""
_TELLS = re.compile(rf"{_MEDIUM}_?(?:id|(?:file_?)?name|key|index)s?")
"""Keys that tell which: harmless beside `image`."""
_WRITTEN = re.compile(r"<img>[^<\n]+</img>|<\|(?:image|video|audio)(?:_pad)?\|>|<\|vision_start\|>|<ImageHere>")
"""What other formats write where a picture stands."""


def unread_picture(extras: Mapping[str, Any], images: Sequence[str], root: Path) -> tuple[str, str] | None:
    """The first key (dotted where it is nested) that names a picture, a video or a sound, and its value in short.

    Beside `image` a web address tells where the picture is from, and a path that is the end of one of its paths (or has
    one as its end) is the same picture. `images` are what the record's `image` names, in the folder `root`.
    """
    for path, value, listed in _leaves(extras):
        named = _says_so(path, beside=bool(images))
        if isinstance(value, str):
            found = _is_picture(value, named, images, root)
        else:  # a number is a count or a size; several under such a name are pixels
            found = named and value is not None and (listed or _TELLS.fullmatch(_words(path[-1])) is not None)
        if found:
            told = str(value)
            return ".".join(path), repr(told if len(told) <= 60 else told[:57] + "...")
    return None


def is_address(path: str) -> bool:
    """Whether this is a picture's content or a place on the web, not a file's path."""
    return bool(_DATA.match(path) or _URL.match(path))


def foreign_placeholder(text: str) -> str | None:
    """What another format writes in a text where a picture stands; None: there is none."""
    found = "<" in text and _WRITTEN.search(text)
    return found.group() if found else None


Leaf = tuple[tuple[str, ...], Any, bool]
"""Keys down to a value, the value, whether it stands in a list."""


def _leaves(extras: Mapping[str, Any]) -> Iterator[Leaf]:
    """Everything that is no object and no list, in order, however deep."""
    todo: list[Leaf] = [((), extras, False)]
    while todo:
        path, value, listed = todo.pop()
        if isinstance(value, Mapping):
            todo += [((*path, str(name)), part, listed) for name, part in reversed([*value.items()])]
        elif isinstance(value, list):
            todo += [(path, part, True) for part in reversed(value)]
        else:
            yield path, value, listed


def _says_so(path: tuple[str, ...], beside: bool) -> bool:
    """Whether a key says that it is a picture's: by itself, with the one above it, or, where the record has no picture,
    by any above it: `images`, `images` > `bytes`, `images` > `left` > `name`."""
    names = {_words(path[-1]), "_".join(map(_words, path[-2:]))}
    if any(map(_HOLDS.fullmatch, names)):
        return True
    return not beside and (any(map(_TELLS.fullmatch, names)) or any(_HOLDS.fullmatch(_words(key)) for key in path))


@lru_cache(maxsize=1024)
def _words(key: str) -> str:
    """`imageUrl` and `Image-URL` as `image_url`."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).strip("_").lower()


def _is_picture(value: str, named: bool, images: Sequence[str], root: Path) -> bool:
    value = value.strip()
    if not value:
        return False
    if _DATA.match(value):
        return True
    if _URL.match(value):
        return not images and (named or _FILE.fullmatch(urlsplit(value).path) is not None)
    if named or _FILE.fullmatch(value):
        return not any(_same(value, image) for image in images)
    return not images and len(value) < 256 and not value.lower().endswith(_TEXT) and _is_file(root, value)


def _same(value: str, image: str) -> bool:
    """Whether one path ends in the other."""
    one, other = (PurePosixPath(path.replace("\\", "/")).parts for path in (value, image))
    shared = min(len(one), len(other))
    return shared > 0 and one[-shared:] == other[-shared:]


@lru_cache(maxsize=4096)  # metadata repeat themselves, and the folder may be far away
def _is_file(root: Path, name: str) -> bool:
    return os.path.isfile(root / name)  # noqa: PTH113 False, too, of what is no path at all
