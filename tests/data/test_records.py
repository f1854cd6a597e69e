"""LLaVA's format: what is read, and that every malformed sample is named with its remedy."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from mmprune_train.data.records import Turn, count_samples, read_annotations
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
    first, second, third = read_annotations(written(tmp_path, GOOD, name), Path("/root")).records
    assert (first.id, first.kind, first.images) == ("7", "open", [Path("/root/a.png")])
    assert first.turns == [Turn("<image>\nwhat?", "red"), Turn("and?", "blue")]
    assert second.images == [Path("/root/a.png"), Path("/root/b/c.png")]
    assert third.images == [] and third.turns == [Turn("hello", "hi")]
    assert third.where == f"{tmp_path / name}[2]" and third.id == f"{name}[2]"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_limit_takes_the_first_and_reads_no_further(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, [GOOD[0], {"conversations": "broken"}], name)
    assert len(read_annotations(file, tmp_path, limit=1).records) == 1
    assert read_annotations(file, tmp_path, limit=1).available == count_samples(file) == 2


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ([], "must be an object"),
        ({"id": "x"}, r"`conversations` is missing"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "a message is not {from, value}"),
        (
            {"id": "x", "conversations": [{"from": "system", "value": "s"}]},
            "unknown role 'system'; write its text into the first",
        ),
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
        read_annotations(file, tmp_path)


PICTURES = [
    {"images": ["0.png"]}, {"image_path": "a/0.png"}, {"video": "clip.mp4"}, {"audio": "a.wav"}, {"file": "x.JPG"},
    {"image_url": "https://host/x"}, {"url": "https://host/x.png?w=3"}, {"img": "0"}, {"imageFile": "0"},
    {"images": [{"bytes": "AAA", "path": None}]}, {"picture": {"url": "x"}}, {"meta": {"videos": ["v"]}},
    {"image_base64": "iVBOR"}, {"x": "data:image/png;base64,AA"}, {"pixel_values": [[0.5, 1.0]]},
    {"image_id": 42}, {"image_name": "cat"}, {"source": "known.bin"}, {"video_frames": ["a", "b"]},
    {"image ": "0"}, {"image_link": "0"}, {"pic": "0"}, {"image_b": "0"}, {"jpg": "0"}, {"images": {"l": {"at": "a"}}},
    {"blob": "/9j/4AAQSkZJRgABAQAAAQABAADAAAAAAAAAAAAA"}, {"x": "0.png \n"}, {"picture_file_name": "0"},
]  # fmt: skip
HARMLESS = [
    {"model": "gpt4", "dataset": "coco", "data_source": "m4", "height": 480, "width": 640, "url": None, "images": []},
    {"image_size": [640, 480], "num_images": "2", "image_width": 3, "has_image": True, "images": [None], "video": ""},
    {"domain": {"chest_xray": True}, "caption": "a picture.\nsaved as a.png", "clip_score": 0.3, "source": "folder"},
    {"source": "chat.json", "img_w": 3, "image_source": "coco", "image_quality": "high", "system": " "},
    {"modality": "image", "source": "https://host/page", "question_type": "photo", "objects": {"bbox": [[1, 2]]}},
]  # fmt: skip


@pytest.mark.parametrize("more", PICTURES, ids=str)
@pytest.mark.parametrize("inside", ["sample", "message"])
def test_a_picture_that_would_not_be_read_is_refused(tmp_path: Path, more: dict[str, Any], inside: str) -> None:
    (tmp_path / "known.bin").touch()
    conversation: list[dict[str, Any]] = [*talk("q", "a")]
    conversation[0] |= more if inside == "message" else {}
    sample = {"id": "x", "conversations": conversation, **(more if inside == "sample" else {})}
    message = rf"\[0\] \(id x\): `{next(iter(more))}.* is not read; name pictures under `image`"
    with pytest.raises(UserError, match=message):
        read_annotations(written(tmp_path, [sample]), tmp_path)


@pytest.mark.parametrize("more", HARMLESS, ids=str)
def test_metadata_are_left_alone(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "chat.json").touch()
    assert read_annotations(written(tmp_path, [{"conversations": talk("q", "a"), **more}]), tmp_path).records


@pytest.mark.parametrize("key", ["image_path", "file_name", "url", "coco_url", "image_id", "images"])
def test_the_same_picture_may_be_named_again_but_no_other(tmp_path: Path, key: str) -> None:
    sample = {"id": "x", "image": "coco/1.jpg", "conversations": talk("<image>", "a")}
    same = {"url": "https://host/0.jpg", "coco_url": "https://host/0.jpg", "image_id": 7}.get(key, "/data/coco/1.jpg")
    assert read_annotations(written(tmp_path, [{**sample, key: same}]), tmp_path).records
    if "url" not in key and key != "image_id":
        with pytest.raises(UserError, match=f"`{key}` names a picture"):
            read_annotations(written(tmp_path, [{**sample, key: "coco/2.jpg"}]), tmp_path)


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ('{"id": "x", "image": "a.png", "conversations": [], "image": null}', "of 'x' has the key 'image' twice"),
        ('{"id": "x", "conversations": [{"from": "human", "value": "q", "value": "r"}]}', "the key 'value' twice"),
    ],
)
def test_a_key_that_is_given_twice_is_not_dropped(tmp_path: Path, sample: str, told: str) -> None:
    for name, text, place in (("a.json", f"[{sample}]", r"\[0\]"), ("a.jsonl", f"\n{sample}", ", line 2")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}{place}: an object .*{told}"):
            read_annotations(tmp_path / name, tmp_path)


def test_an_id_may_be_null_and_a_kind_a_number(tmp_path: Path) -> None:
    sample = {"id": None, "kind": 0, "conversations": talk("q", "a")}
    (record,) = read_annotations(written(tmp_path, [sample]), tmp_path).records
    assert (record.id, record.kind) == ("a.json[0]", "0")


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": talk("q", f"broken {HALF} half")}, r"message 1 has half of a .* \(\\ud83d\) at character 7"),
        ({"conversations": talk(f"{HALF}?", "a")}, "message 0 has half of a surrogate pair"),
        ({"id": f"x{HALF}"}, "the id has half of a surrogate pair"),
        ({"image": f"{HALF}.png", "conversations": talk("<image>", "a")}, "a path in `image` has half"),
        ({"image": "a\0.png", "conversations": talk("<image>", "a")}, "a path in `image` contains a NUL"),
        ({"image": "https://host/a.png", "conversations": talk("<image>", "a")}, "`image` is an address"),
        ({"image": "data:image/png;base64,AA", "conversations": talk("<image>", "a")}, "`image` is an address"),
        ({"system": "You are a pirate."}, "`system` is not read; write its text into"),
        ({"system_prompt": "Be brief."}, "`system_prompt` is not read; write its text into"),
        ({"kind": ["open"]}, "`kind` is not a word"),
        ({"conversations": [], "messages": [{"role": "user"}]}, "`messages` with role and content are not read"),
        ({"conversations": talk("Picture 1: <img>a.png</img>", "a")}, "another format's picture .*write <image> in"),
        (
            {"conversations": [{"from": "human", "value": [{"type": "image"}]}]},
            "a list of 1 parts; write its text as one",
        ),
    ],
)
def test_what_cannot_be_trained_as_it_is_written_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    sample = {"id": "x", "conversations": talk("q", "a"), **change}
    for require_answers in (True, False):
        with pytest.raises(UserError, match=rf"a\.json\[0\] \(id x.*\): .*{reason}") as caught:
            read_annotations(written(tmp_path, [sample]), tmp_path, require_answers=require_answers)
        str(caught.value).encode()


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(
        '[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "\\ud83d\\ude00"}]}]'
    )
    assert read_annotations(file, tmp_path).records[0].turns[0].answer == "\U0001f600"


def test_evaluation_may_ask_without_knowing_the_answer(tmp_path: Path) -> None:
    file = written(tmp_path, [{"id": "x", "conversations": talk("q")}])
    assert read_annotations(file, tmp_path, require_answers=False).records[0].turns == [Turn("q", "")]


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
        read_annotations(tmp_path / name, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json.*task=prepare"):
        read_annotations(tmp_path / "nowhere.json", tmp_path)


WHERE_UNREAD = ("nested too deeply", "4300", "NaN is no number", "-Infinity is no number")
"""Reasons that are told before a sample's id is known."""


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def record(**more: str) -> str:
    """A sample with keys whose values are JSON already."""
    fields = {"id": '"x"', "conversations": json.dumps(talk("q", "a")), **more}
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in fields.items()) + "}"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("sample", "told"),
    [
        (record(meta=nested(100_000)), "nested too deeply"),
        (record(conversations="[" * 100_000), "nested too deeply"),
        (record(id="9" * 5000), "4300"),
        (record(meta="[" + "1" * 5000 + "]"), "4300"),
        (record(score="NaN"), "NaN is no number"),
        (record(conversations='[{"from": "human", "value": -Infinity}]'), "-Infinity is no number"),
        (record(**{"\ud800": '"a.png"'}), r"\(id x\).*\\ud800"),
        (record(id='"\\ud800"'), r"\(id \\ud800\).*half of a surrogate pair"),
        (record(image='"a\\ud83d.png"'), r"\(id x\).*half of a surrogate pair"),
        (record(image='"a\\u0000.png"'), r"\(id x\).*NUL"),
        (record(image=json.dumps("a/" * 10**6)), r"\(id x\).*has 2,000,000 characters"),
        (record(id=nested(50)), "`id` is a dict"),
        (record(id=json.dumps("i" * 10**6), image="3"), r"\.\.\.\): `image` must be a path"),
        (record(conversations=json.dumps([{"from": "r" * 10**6, "value": ""}])), r"\(id x\).*unknown role 'rr"),
        (record(conversations=f'[{{"from": {nested(50)}, "value": ""}}]'), r"\(id x\).*unknown role of type dict"),
        (record(**{"image_" + "0" * 10**6: '"a.png"'}), r"\(id x\).*names a picture"),
    ],
)  # fmt: skip
def test_whatever_a_sample_holds_its_error_is_a_line(tmp_path: Path, sample: str, told: str, name: str) -> None:
    file = tmp_path / name
    file.write_text(f"{record()}\n{sample}\n" if name == "a.jsonl" else f"[{record()}, {sample}]")
    for answers in (True, False):
        with pytest.raises(UserError) as caught:
            read_annotations(file, tmp_path, require_answers=answers)
        line = str(caught.value)
        line.encode()
        assert str(file) in line and len(line) < 1000 and "\n" not in line
        assert re.search(told, line), line
        unread = told in WHERE_UNREAD
        assert (f"{file}, line 2:" if unread and name == "a.jsonl" else f"{file}[1]{':' if unread else ' (id'}") in line


def test_metadata_may_be_as_deep_as_they_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        f"[{record(meta=nested(900), system=nested(800).replace('1', '[]'), other='1e999')}]"
    )
    with pytest.raises(UserError, match="`system` is not read"):
        read_annotations(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.json").write_text(f"[{record(meta=nested(900), other='1e999')}]")
    assert len(read_annotations(tmp_path / "a.json", tmp_path).records) == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "/dev/null"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_annotation_file_is_a_file(tmp_path: Path, name: str, kind: str) -> None:
    file = tmp_path / name
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(kind)
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(a (pipe|folder|device), not a file\)"):
        read_annotations(file, tmp_path)
