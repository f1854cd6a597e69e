"""A path in an annotation file stays in the image folder, unless a key lets it out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.image_folder import ImageFolder
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.data.records import read_annotations
from mmprune_train.errors import UserError
from mmprune_train.evaluation.questions import check_images, read_questions

PROCESSOR = image_processor(EncoderConfig(name="t", image_size=16, patch_size=8), "square")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder behind a link, with links to a folder and a file in it and out of it."""
    (tmp_path / "real" / "coco").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("real/a.png", "real/coco/b.png", "elsewhere/c.png", "real-too.png"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / place)
    root = tmp_path / "images"
    root.symlink_to(tmp_path / "real")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "out.png").symlink_to(tmp_path / "elsewhere" / "c.png")
    (root / "in").symlink_to("coco")
    (root / "in.png").symlink_to("coco/b.png")
    return root


def annotations(root: Path, image: str) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    file = root.parent / "a.json"
    file.write_text(json.dumps([{"id": "x", "image": image, "conversations": turns}]))
    return file


def see(file: Path, folder: ImageFolder) -> None:
    """As training does: the file is read, then the images."""
    for record in read_annotations(file, folder).records:
        for path in record.images:
            ImageReader(PROCESSOR, folder)(path, record.where)


@pytest.mark.parametrize("name", ["a.png", "coco/../a.png", "in/b.png", "in.png", "{real}/a.png", "{root}/coco/b.png"])
def test_what_stays_in_the_folder_is_read(name: str, root: Path) -> None:
    name = name.format(root=root, real=root.parent / "real")
    see(annotations(root, name), ImageFolder(root))
    check_images(read_questions(annotations(root, name), root), ImageFolder(root))


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/c.png",
        "coco/../../real-too.png",
        "{root}/../real-too.png",
        "{top}/elsewhere/c.png",
        "out/c.png",
        "out.png",
    ],
)
def test_what_leads_out_of_it_is_refused_with_the_key_that_allows_it(name: str, root: Path) -> None:
    file = annotations(root, name.format(root=root, top=root.parent))
    told = r"a\.json\[0\].*leads to .*outside of the image folder .*data\.outside_images=true"
    with pytest.raises(UserError, match=told):
        see(file, ImageFolder(root))
    if name != "out.png":  # found when it is read; the others before training
        with pytest.raises(UserError, match=told):
            read_annotations(file, root)
    with pytest.raises(UserError, match="outside of the image folder"):
        check_images(read_questions(file, root), ImageFolder(root))
    allowed = ImageFolder(root, outside=True)
    see(file, allowed)
    check_images(read_questions(file, allowed), allowed)
