"""MM-Vet: open questions, whose answers an external model judges."""

from __future__ import annotations

from mmprune_train.evaluation.benchmarks.files import Folder, by_key
from mmprune_train.evaluation.benchmarks.item import Asked, Item, Loaded
from mmprune_train.evaluation.benchmarks.tables import Row


def mmvet(folder: Folder, asked: Asked) -> Loaded:
    """`mm-vet.json`; a question's kind is the capabilities it needs."""
    path, images = folder.need("mm-vet.json"), folder.images("images")
    items = []
    for number, one in by_key(path).items():
        kind = "_".join(one.texts("capability")) if "capability" in one.values else "all"
        image, prompt = images / one.text("imagename"), asked.prompted(one.text("question"))
        answers = (one.text("answer"),) if "answer" in one.values else ()
        items.append(Item(number, (image,), prompt, answers, kind, "test", one.where))
    return Loaded(items, [path])


def mmvet_row(row: Row, asked: Asked) -> list[Item]:
    """The judge's file wants the official ids, `v1_0` and on."""
    index, prompt = row.need("index"), asked.prompted(row.need("question"))
    number = f"v1_{index}" if index.isdecimal() else index
    return [Item(number, row.images, prompt, row.answers, row.get("category") or "all", "test", row.where)]
