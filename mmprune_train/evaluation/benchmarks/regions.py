"""RefCOCO, RefCOCO+ and RefCOCOg: the box of the region that a sentence describes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.files import AGAIN, Entry, Folder, entries, read_json
from mmprune_train.evaluation.benchmarks.item import Asked, Item, Loaded
from mmprune_train.evaluation.benchmarks.tables import Row
from mmprune_train.evaluation.metrics.boxes import Box, in_image, in_padded_square, read_box

SETS = ("refcoco", "refcoco+", "refcocog")
SPLIT_FILE = re.compile(r"(?:REC_)?(refcoco[+g]?)(?:_[a-z]+)?_(val|testA|testB|test)\.jsonl?")
"""`refcoco_testA.jsonl` as Qwen-VL's, `REC_refcoco_unc_val.jsonl` as Shikra's, `refcocog_test.json` as MiniGPT-v2's."""
PICTURES = ("train2014", "images/train2014", "images", "coco/train2014")
PICKLE = "refs(*).p"
REMEDY = (
    "a pickle may run code when it is read, so it is not: write it once as JSON where you trust it "
    "(json.dump(pickle.load(open('refs(unc).p', 'rb')), open('refs(unc).json', 'w')))"
)


def refcoco(folder: Folder, asked: Asked) -> Loaded:
    """Lists of one split each, or `SET/refs(unc).json` with `SET/instances.json`; training splits are left out."""
    images = folder.images(*PICTURES)
    parts, files = list[tuple[Path, list[Item]]](), list[Path]()
    for place in folder.places:
        for path in sorted(place.glob("*.json*")):
            if match := SPLIT_FILE.fullmatch(path.name):
                files.append(path)
                parts.append((path, [_listed(one, images, asked, *match.groups()) for one in entries(path)]))
        if parts:
            break
    for name in () if parts else SETS:
        for refs in sorted(home.glob("refs(*).json")) if (home := folder.find(name)) else ():
            files += [refs, refs.with_name("instances.json")]
            parts.append((refs, list(_official(refs, name, images, asked))))
    items, source = list[Item](), dict[str, Path]()
    for path, found in parts:
        mine = [item for item in found if asked.split in (None, item.split)]
        for kind in {item.kind for item in mine}:
            if (other := source.setdefault(kind, path)) != path:
                raise UserError(f"{path}: {other.name} has {kind}, too; keep one of both in the folder")
        items += mine
    if not items:
        pickles = [path for place in folder.places for path in (*place.glob(PICKLE), *place.glob(f"*/{PICKLE}"))]
        told = f"{pickles[0]}: {REMEDY}" if pickles else f"there is no refcoco_val.jsonl in {folder.places[0]}"
        raise NotHere(told if asked.split is None else f"{told}, or none of split {asked.split}")
    return Loaded(items, files)


def _listed(one: Entry, images: Path, asked: Asked, name: str, split: str) -> Item:
    """Shikra and Qwen-VL write corners, MiniGPT-v2 (`img_id`, `sents`) a corner and a size."""
    sentence = one.text("expression", "sent", "sents", "sentence")
    box = one.numbers("bbox", 4)
    if "sents" in one.values:
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    image = Path(one.text("img_path", "image", "img_id")).name
    image = image if Path(image).suffix else f"{image}.jpg"
    number = f"{name}_{split}/{one.where.rpartition('/')[2]}"
    return _item(number, images / image, sentence, box, _size(one), asked, f"{name}_{split}", split, one.where)


def _official(refs: Path, name: str, images: Path, asked: Asked) -> Iterator[Item]:
    """The refs as they are published, every sentence a question."""
    instances = refs.with_name("instances.json")
    if not instances.is_file():
        raise NotHere(f"there is no {instances}, which has the boxes of {refs}")
    whole = Entry(read_json(instances), str(instances))
    boxes = {one.text("id"): one for one in whole.list_of("annotations")}
    pictures = {one.text("id"): one for one in whole.list_of("images")}
    for ref in entries(refs):
        if (split := ref.text("split")) == "train":
            continue
        box, picture = boxes.get(ref.text("ann_id")), pictures.get(ref.text("image_id"))
        if box is None or picture is None:
            raise UserError(f"{ref.where}: {instances} has no such ann_id or image_id; get both files again")
        left, top, width, height = box.numbers("bbox", 4)
        corners, image = [left, top, left + width, top + height], images / picture.text("file_name")
        for sentence in ref.list_of("sentences"):
            number, kind = f"{name}/{sentence.text('sent_id')}", f"{name}_{split}"
            words = sentence.text("sent")
            yield _item(number, image, words, corners, _size(picture), asked, kind, split, sentence.where)


def _size(one: Entry) -> tuple[float, float]:
    return float(one.of("width", kinds=(int, float))), float(one.of("height", kinds=(int, float)))


def _item(
    number: str,
    image: Path,
    sentence: str,
    corners: list[float],
    size: tuple[float, float],
    asked: Asked,
    kind: str,
    split: str,
    where: str,
) -> Item:
    box = in_frame((corners[0], corners[1], corners[2], corners[3]), size, asked.box_frame, where)
    return Item(number, (image,), asked.prompted(sentence), (_told(box),), kind, split, where, extra={"box": box})


def _told(box: Box) -> str:
    return f"[{', '.join(f'{side:.3f}' for side in box)}]"


def in_frame(box: Box, size: tuple[float, float], frame: str, where: str) -> Box:
    """A box in pixels as shares of the padded square or the image; UserError for a box or a size that is none."""
    if min(size) <= 0 or box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(f"{where}: box {list(box)} in an image of {size[0]:g} x {size[1]:g} is none; {AGAIN}")
    return (in_padded_square if frame == "padded" else in_image)(box, *size)


def refcoco_row(row: Row, asked: Asked) -> list[Item]:
    """Corners in pixels in `bbox_x1` to `bbox_y2`, or in `answer`, with `width` and `height`."""
    names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    cells = [row.get(name) for name in names]
    corners = read_box(f"[{','.join(cells)}]" if all(cells) else row.need("answer"))
    size = read_box(f"[{row.need('width')},{row.need('height')},0,0]")
    if corners is None or size is None:
        raise UserError(f"{row.where}: no box of four numbers, or no width and height; {AGAIN}")
    box = in_frame(corners, size[:2], asked.box_frame, row.where)
    kind, split = row.get("category") or row.get("split") or "all", row.get("split")
    prompt, extra = asked.prompted(row.need("question")), {"box": box}
    return [Item(row.need("index"), row.images, prompt, (_told(box),), kind, split, row.where, extra=extra)]
