"""Bytes that are not as they were."""

from __future__ import annotations

import random

MARKS = (
    b"\0", b"\xff", b"\x00\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[2J", b"\n", b'"', b"\\", b"\\ud800",
    b"{", b"]", b"\xff" * 8,
)  # fmt: skip

KINDS = ("flip", "flip", "head", "flips", "cut", "insert", "fill", "drop", "double", "reverse")


def flip(rng: random.Random, data: bytes, start: int = 0, stop: int | None = None) -> tuple[bytes, str]:
    """One bit of `data[start:stop]`."""
    at, bit = rng.randrange(start, len(data) if stop is None else stop), rng.randrange(8)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], f"bit {bit} of byte {at} of {len(data)}"


def bytes_of(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Cut, flipped, filled, doubled: data, and what was done."""
    if not data:
        return rng.choice(MARKS), "something where nothing was"
    kind = rng.choice(KINDS)
    at = rng.randrange(len(data))
    if kind == "flip":
        return flip(rng, data)
    if kind == "head":
        return flip(rng, data, stop=min(len(data), 64))
    if kind == "flips":
        many = bytearray(data)
        for _ in range(rng.choice([4, 30])):
            many[rng.randrange(len(many))] = rng.randrange(256)
        return bytes(many), "several bytes"
    length = min(rng.choice([1, 2, 4, 16, 200]), len(data) - at)
    if kind == "cut":
        return data[:at], f"cut at byte {at} of {len(data)}"
    if kind == "insert":
        return data[:at] + (mark := rng.choice(MARKS)) + data[at:], f"{mark!r} at byte {at}"
    if kind == "fill":
        return data[:at] + rng.choice([b"\0", b"\xff"]) * length + data[at + length :], f"{length} bytes filled at {at}"
    if kind == "drop":
        return data[:at] + data[at + length :], f"{length} bytes dropped at {at}"
    if kind == "double":
        return data[:at] + data[at : at + length] + data[at:], f"{length} bytes doubled at {at}"
    return data[:at] + data[at : at + length][::-1] + data[at + length :], f"{length} bytes reversed at {at}"
