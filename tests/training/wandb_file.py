"""Reads what an offline wandb run has written: records of protobuf in blocks of 32 KiB, as in LevelDB's log."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

BLOCK, HEADER = 1 << 15, 7
FULL, FIRST, LAST = 1, 2, 4


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged, with wandb's own `_step`."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return rows


def records(data: bytes) -> list[bytes]:
    found, at, part = [], HEADER, b""  # the file has a header of its own
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no room for another: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        part = (b"" if kind in (FULL, FIRST) else part) + data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            found.append(part)
    return found
