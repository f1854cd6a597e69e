"""LLaVA's format: what is read, and that every malformed sample is named with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmprune_train.data.records import Turn, read_records
from mmprune_train.errors import UserError


def talk(*messages: str, first: str = "human") -> list[dict[str, str]]:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[k % 2], "value": text} for k, text in enumerate(messages)]


def written(folder: Path, samples: list[Any], name: str = "a.json") -> Path:
    file = folder / name
    if file.suffix == ".jsonl":
        file.write_text("\n\n".join(json.dumps(sample) for sample in samples) + "\n")
    else:
        file.write_text(json.dumps(samples))
    return file


GOOD = [
    {"id": 7, "image": "a.png", "conversations": talk("<image>\nwhat?", "red", "and?", "blue"), "kind": "open"},
    {"id": "two", "image": ["a.png", "b/c.png"], "conversations": talk("<image> or", "no", "<image>?", "yes")},
    {"conversations": talk("dropped", "hello", "hi", first="gpt")},
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_turns_images_and_text_only_samples(tmp_path: Path, name: str) -> None:
    first, second, third = read_records(written(tmp_path, GOOD, name), Path("/root"))
    assert (first.id, first.kind, first.images) == ("7", "open", [Path("/root/a.png")])
    assert first.turns == [Turn("<image>\nwhat?", "red"), Turn("and?", "blue")]
    assert second.images == [Path("/root/a.png"), Path("/root/b/c.png")]
    assert third.images == [] and third.turns == [Turn("hello", "hi")]
    assert third.where == f"{tmp_path / name}[2]" and third.id == f"{name}[2]"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_limit_takes_the_first_and_reads_no_further(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, [GOOD[0], {"conversations": "broken"}], name)
    assert len(read_records(file, tmp_path, limit=1)) == 1


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ([], "must be an object"),
        ({"id": "x"}, r"`conversations` is missing"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "a message is not {from, value}"),
        ({"id": "x", "conversations": [{"from": "system", "value": "s"}]}, "unknown role 'system'; use human or gpt"),
        ({"id": "x", "conversations": [*talk("q", "a"), *talk("b", first="gpt")]}, r"two gpt .*\(message 2\)"),
        ({"id": "x", "conversations": talk("a", first="gpt")}, "there is no question"),
        ({"id": "x", "conversations": talk("q")}, "the last question has no answer"),
        ({"id": "x", "conversations": talk("q", "a", "r", "  ")}, "the answer of turn 2 is empty; write it"),
        ({"id": "x", "conversations": talk("<image>", "a")}, r"1 <image> for 0 image\(s\); write one"),
        ({"id": "x", "image": ["a", "b"], "conversations": talk("<image>", "a")}, r"1 <image> for 2 image\(s\)"),
        ({"id": "x", "image": "a", "conversations": talk("q", "a")}, r"0 <image> for 1 image\(s\)"),
        ({"id": "x", "image": "a", "conversations": talk("q", "<image>")}, "an answer contains <image>"),
        ({"id": "x", "image": {"path": "a"}, "conversations": talk("q", "a")}, "`image` must be a path"),
    ],
)
def test_a_malformed_sample_is_named(tmp_path: Path, sample: Any, reason: str) -> None:
    file = written(tmp_path, [GOOD[0], sample])
    name = r".*\(id x\): " if isinstance(sample, dict) else ".*"
    with pytest.raises(UserError, match=rf"a\.json\[1\]{name}{reason}"):
        read_records(file, tmp_path)


def test_evaluation_may_ask_without_knowing_the_answer(tmp_path: Path) -> None:
    file = written(tmp_path, [{"id": "x", "conversations": talk("q")}])
    assert read_records(file, tmp_path, require_answers=False)[0].turns == [Turn("q", "")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "[{", "not JSON"),
        ("a.json", '{"id": 1}', "expected a list of samples"),
        ("a.json", "[]", "no samples"),
        ("a.jsonl", '{"conversations"\n', "line 1: not JSON"),
        ("a.json", "\xff", "not JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}.*{reason}"):
        read_records(tmp_path / name, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json.*task=prepare"):
        read_records(tmp_path / "nowhere.json", tmp_path)
