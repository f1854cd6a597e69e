"""Image files that Pillow does not write, and the pixels that are read of any."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from mmprune_train.data.images import read_image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, array: np.ndarray, colour: int, *chunks: bytes, side: int | None = None) -> Path:
    """A PNG with the array's own depth, which Pillow does not write; `colour` is PNG's colour type, `side` what its
    header says instead of its size."""
    bits = array.dtype.itemsize * 8
    header = struct.pack(">IIBBBBB", side or array.shape[1], side or array.shape[0], bits, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


def pixels(path: Path, **settings: bool) -> np.ndarray:
    image = read_image(path, "sample", **settings)
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)
