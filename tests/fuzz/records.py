"""Records of LLaVA's format that are broken in structure or in bytes, on the way from the file to a training batch."""

from __future__ import annotations

import copy
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fuzz.harness import Case, Fault
from fuzz.mutate import bytes_of
from PIL import Image
from training.synthetic import entry

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config, SplitConfig
from mmprune_train.data.batch import Batch
from mmprune_train.model.tokenizer import VOCABULARY, tiny_tokenizer
from mmprune_train.tasks.evaluate import question_set
from mmprune_train.training.inputs import stage_annotations, stage_loader

STAGES = ("pretrain", "instruct")
PLAIN = 2
TOKENS = 36
WORDS = ("What colour is it?", "a red square", "né, 形, 🟥", "yes", "1 + 1 = 2", "A" * 300)
HUGE = 10**30
_known: dict[str, Any] = {}


def warm(root: Path) -> None:
    """Settings of the smoke experiment, and its tokenizer."""
    settings = [f"stage.{stage}.{size}=1" for stage in STAGES for size in ("batch_size", "global_batch_size")]
    settings += [f"data.{stage}.annotations=x.json" for stage in STAGES]
    _known["config"] = compose_config(["+experiment=smoke", "data=files", *settings])
    _known["tokenizer"] = tiny_tokenizer()


def plain(rng: random.Random, folder: Path, number: int) -> Case:
    """A file that is as it should be."""
    stage = rng.choice(STAGES)
    return _case("nothing", json.dumps(_records(rng, stage)).encode(), "json", stage, rng, folder)


def case(rng: random.Random, folder: Path, number: int) -> Case:
    """A file with one to three faults."""
    stage = rng.choice(STAGES)
    records = _records(rng, stage)
    suffix = rng.choice(["json", "jsonl"])
    told = []
    for _ in range(rng.choice([1, 1, 1, 1, 2])):
        change = rng.choice(STRUCTURAL)
        told.append(f"{change.__name__.strip('_')}({change(rng, records, folder)})")
    if suffix == "json":
        written = json.dumps(records, ensure_ascii=rng.random() < 0.5)
    else:
        written = "\n".join(json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records)
    data = written.replace('"@raw', "").replace('raw@"', "").encode(errors="surrogatepass")
    if rng.random() < 0.35:
        if rng.random() < 0.5:
            told = []
            data = json.dumps(_records(rng, stage)).encode()
        data, how = bytes_of(rng, data)
        told.append(how)
    return _case(", ".join(told), data, suffix, stage, rng, folder)


def _case(told: str, data: bytes, suffix: str, stage: str, rng: random.Random, folder: Path) -> Case:
    images = folder / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 30), "red").save(images / name)
    (images / "text.png").write_text("no picture")
    (images / "empty.png").touch()
    (images / "folder.png").mkdir()
    os.mkfifo(images / "fifo.png")
    (images / "zero.png").symlink_to("/dev/zero")
    (images / "loop.png").symlink_to("loop.png")
    (folder / "outside.png").write_bytes((images / "a.png").read_bytes())
    file = folder / f"annotations.{suffix}"
    file.write_bytes(data)
    evaluates = rng.random() < 0.25
    config: Config = _known["config"]
    split = SplitConfig(str(file), str(images))
    config = replace(
        config, data=replace(config.data, root=str(folder), pretrain=split, instruct=split, evaluate=split)
    )

    def run() -> str:
        if evaluates:
            question_set(config)
            return "accepted as questions"
        data = stage_annotations(config, stage)
        loader = stage_loader(config, stage, _known["tokenizer"], TOKENS, 0, 1, data.records)
        loader.dataset.check_cuts()
        for step in loader.steps(0, -(-len(data.records) // loader.most)):
            for batch in step:
                _check(batch)
        return "accepted"

    names = [file.name, str(images), *["question "] * evaluates]
    return Case(f"{stage}, {'questions, ' * evaluates}{suffix}: {told}", names, run)


def _check(batch: Batch) -> None:
    sequence = batch.sequence
    if int(sequence.ids.min()) < 0 or int(sequence.ids.max()) >= VOCABULARY:
        raise Fault(f"token ids {sequence.ids.tolist()}")
    if batch.pixel_values is not None and not torch.isfinite(batch.pixel_values).all():
        raise Fault("pixels that are not finite")
    if batch.supervised < 1:
        raise Fault("a batch without anything to train on")


def _records(rng: random.Random, stage: str) -> list[Any]:
    made = []
    for number in range(rng.randint(1, 6)):
        images = rng.choice([None, "a.png", "a.png", ["a.png", "b.png"]])
        marks = "<image>\n" * (0 if images is None else 1 if isinstance(images, str) else len(images))
        said = [marks + rng.choice(WORDS), rng.choice(WORDS)]
        if stage == "instruct":  # whose template takes several turns
            said += [rng.choice(WORDS) for _ in range(2 * rng.randint(0, 2))]
        made.append(entry(f"sample{number}", images, said))
    return made


def _odd(rng: random.Random) -> Any:
    """A value that does not belong where it is put."""
    nested: Any = "deep"
    for _ in range(rng.choice([3, 50, 400])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return rng.choice(
        [
            None, True, False, 0, -1, HUGE, -HUGE, 1.5, float("nan"), float("inf"), "", " ", [], {}, [[]], [None],
            {"": None},
            "@raw" + "9" * rng.choice([400, 5000]) + "raw@", "@raw1e999raw@", "@raw" + "[" * 3000 + "]" * 3000 + "raw@",
            "@raw" + "[" * 200_000 + "raw@", "@rawInfinityraw@", "@raw-NaNraw@", nested, _text(rng), [_text(rng)],
            {"a": _text(rng)},
        ]
    )  # fmt: skip


def _text(rng: random.Random) -> str:
    return rng.choice(
        [
            "\0", "a\0b", "\ud800", "x\udfffy", "\x1b[31mred\x1b[0m", "\x07\x08\r", "\u202egnp.a", "\ufeff", "\ufffe",
            "e\u0301" * 200,
            "🟥" * 50, "<image>", "<image>" * 50, "<Image>", "< image>", "<|endoftext|>", "</s>", "<s>", "<pad>",
            "<unk>", "USER: x ASSISTANT:",
            "$\\frac{$", "{{ 7 * 7 }}", "${oc.env:HOME}", "../../etc/passwd", "'; DROP TABLE", "\n" * 500, " " * 1000,
            "a" * 100_000,
            "\u2028", "\x85", "%s%n", "\t", "<script>alert(1)</script>", "<img>x.png</img>", "http://a/b.png",
            "data:image/png;base64,AA",
            "a" * 5000, "\u200b", "0", "nan", "-", "İ" * 20, "ﬃ" * 20, "\U000e0001", "\U0010ffff",
        ]
    )  # fmt: skip


def _place(rng: random.Random, records: list[Any]) -> tuple[Any, Any]:
    """A container anywhere in the records, and a key or an index in it."""
    places = []

    def walk(value: Any) -> None:
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in list(inside):
            places.append((value, key))
            walk(part)

    walk(records)
    return rng.choice(places) if places else (records, None)


def _shown(value: Any) -> str:
    return ascii(value)[:80]


def _swap(rng: random.Random, records: list[Any], folder: Path) -> str:
    where, key = _place(rng, records)
    if key is None:
        return "nowhere"
    where[key] = _odd(rng)
    return f"{_shown(key)}={_shown(where[key])}"


def _drop(rng: random.Random, records: list[Any], folder: Path) -> str:
    where, key = _place(rng, records)
    if key is not None:
        del where[key]
    return _shown(key)


def _duplicate(rng: random.Random, records: list[Any], folder: Path) -> str:
    where, key = _place(rng, records)
    if isinstance(where, list) and key is not None:
        where.insert(key, copy.deepcopy(where[key]))
    elif key is not None:
        where[rng.choice([*NAMES, f"{key}2"])] = where[key]
    return _shown(key)


def _add(rng: random.Random, records: list[Any], folder: Path) -> str:
    where, _ = _place(rng, records)
    name = rng.choice([*NAMES, _text(rng)])
    if isinstance(where, dict):
        where[name] = _odd(rng)
    else:
        where.append(_odd(rng))
    return _shown(name)


def _text_in(rng: random.Random, records: list[Any], folder: Path) -> str:
    places = [_place(rng, records) for _ in range(30)]
    where, key = next(((w, k) for w, k in places if k is not None and isinstance(w[k], str)), (records, None))
    if key is None:
        return "nowhere"
    text, at = where[key], rng.randint(0, len(where[key]))
    where[key] = text[:at] + _text(rng) + text[at:] if rng.random() < 0.7 else _text(rng)
    return f"{_shown(key)}={_shown(where[key])}"


def _path(rng: random.Random, records: list[Any], folder: Path) -> str:
    chosen = rng.choice(
        [
            "../outside.png", "../images/a.png", "..", ".", "/", "/dev/zero", "/dev/stdin", "/dev/tty", "/etc/passwd",
            "/proc/self/mem",
            "fifo.png", "zero.png", "loop.png", "folder.png", "text.png", "empty.png", "missing.png", "a.png/",
            "a.png/b", "./a.png", "A.PNG",
            "a" * 300 + ".png", "a/" * 3000 + "a.png", "a.png\0", "\ud800.png", "a.png ", "", "~/a.png", "C:\\a",
            "file:///a.png", "//a.png",
            str(folder / "outside.png"), "http://example.com/a.png", "images/a.png", "\x1b[2J.png", "a\n.png", "🟥.png",
        ]
    )  # fmt: skip
    owners = [record for record in records if isinstance(record, dict)]
    if owners:
        record = rng.choice(owners)
        now = record.get("image")
        record["image"] = [chosen, *now[1:]] if isinstance(now, list) else chosen
        if now is None and rng.random() < 0.8 and isinstance(record.get("conversations"), list):
            for message in record["conversations"][:1]:
                if isinstance(message, dict):
                    message["value"] = f"<image>\n{message.get('value')}"
    return _shown(chosen)


def _role(rng: random.Random, records: list[Any], folder: Path) -> str:
    role = rng.choice(["human", "gpt", "user", "assistant", "system", "tool", "Human", "GPT", "", "gpt ", "\0", "bing"])
    messages = [
        message
        for record in records
        if isinstance(record, dict) and isinstance(record.get("conversations"), list)
        for message in record["conversations"]
        if isinstance(message, dict)
    ]
    if messages:
        rng.choice(messages)["from"] = role
    return _shown(role)


def _whole(rng: random.Random, records: list[Any], folder: Path) -> str:
    records[:] = rng.choice([[], records[:1] * 300, [[*records]], records[::-1], [*records, None], [[], *records]])
    return f"{len(records)} records"


NAMES = (
    "images", "Image", "image", "id ", "id", "conversation", "messages", "video", "system", "kind", "metadata",
    "content", "role", "", "\0", "\ud800",
)  # fmt: skip
STRUCTURAL = (_swap, _drop, _duplicate, _add, *[_text_in] * 4, *[_path] * 3, _role, _whole)
