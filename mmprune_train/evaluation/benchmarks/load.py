"""A benchmark found under a folder, and which of its items are asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS
from mmprune_train.evaluation.benchmarks.files import Folder
from mmprune_train.evaluation.benchmarks.item import QUESTION, Asked, Item, Loaded
from mmprune_train.evaluation.benchmarks.tables import read_rows
from mmprune_train.storage.user_files import short


def load(
    name: str,
    root: Path,
    prompt: str | None = None,
    split: str | None = None,
    ocr_tokens: bool = True,
    box_frame: str = "padded",
) -> Loaded:
    """The items whose images are there, from the official files or, where these are not there, from a TSV.

    Args:
        name: of the benchmark, one of `BENCHMARKS`.
        root: folder that holds the benchmark's own, or is it.
        prompt: in place of the benchmark's own, with `{question}` in it.
        split: as `Asked`, like the two that follow.
    Raises:
        NotHere: a file is missing, with where to get it.
        UserError: one is damaged, with the line or entry.
    """
    benchmark = BENCHMARKS[name]
    if prompt is not None and QUESTION not in prompt:
        raise UserError(f"evaluate.prompts.{name}: there is no {QUESTION} in it, where the question is to stand")
    asked = Asked(prompt or benchmark.prompt, split, ocr_tokens, box_frame)
    folder = Folder(root, benchmark.folders)
    try:
        found = benchmark.load(folder, asked)
    except NotHere as error:
        if (table := folder.find(*benchmark.tables)) is None:
            told = f"{error}, and no {benchmark.tables[0]} either"
            raise NotHere(f"{benchmark.title}: {told}; get it from {benchmark.get}") from None
        items = [item for row in read_rows(table) for item in benchmark.row(row, asked)]
        if not items:
            raise NotHere(f"{benchmark.title}: {table} has no question") from None
        found = Loaded(items, [table])
    if split is not None:
        found = replace(found, items=_of_split(found.items, split, name))
    _check_groups(found.items, benchmark.together)
    _check_places(found, root)
    found = replace(found, ids=tuple(item.id for item in found.items))
    return _with_images(found, benchmark.title, benchmark.get)


def _of_split(items: Sequence[Item], split: str, name: str) -> list[Item]:
    if not (found := [item for item in items if item.split == split]):
        there = ", ".join(dict.fromkeys(item.split or "without a name" for item in items))
        raise UserError(
            f"evaluate.splits.{name}={split}: there is no such split in the files of {name}; it has {there}"
        )
    return found


def _check_groups(items: Sequence[Item], size: int | None) -> None:
    """Raise UserError for a group of another size, where all are of one."""
    groups: dict[str, list[Item]] = {}
    for item in items if size else ():
        groups.setdefault(item.group, []).append(item)
    for name, group in groups.items():
        if len(group) != size:
            told = f"{len(group)} questions are about picture {name}, where {size} are scored together"
            remedy = "in a table both have its image_path, or one in its column image the index of the other"
            raise UserError(f"{group[-1].where}: {told}; {remedy}")


def _check_places(found: Loaded, root: Path) -> None:
    """Raise UserError for a name in a file, which may come from anyone, that leads out of the folder."""
    for item in found.items:
        for image in (one for one in item.images if isinstance(one, Path)):
            if not image.is_relative_to(root) or ".." in image.relative_to(root).parts:
                raise UserError(f"{item.where}: image {short(str(image), 500)} leads out of {root}; correct the file")


def _with_images(found: Loaded, title: str, get: str) -> Loaded:
    """Without the items whose images are not there, which a note counts; NotHere where none is."""
    images = {image for item in found.items for image in item.images if isinstance(image, Path)}
    missing = {image for image in images if not image.is_file()}
    lost = [item for item in found.items if not missing.isdisjoint(item.images)]
    if not lost:
        return found
    first = next(image for image in lost[0].images if image in missing)
    told = f"{len(missing):,} of {len(images):,} images are missing, the first is {short(str(first), 500)}"
    left = [item for item in found.items if missing.isdisjoint(item.images)]
    if not left:
        raise NotHere(f"{title}: {told}; get them from {get}")
    note = f"{told}; {len(lost):,} of {len(found.items):,} questions are not asked"
    return replace(found, items=left, notes=(*found.notes, note))


def choose(items: Sequence[Item], kinds: Sequence[str], limit: int | None, name: str) -> list[Item]:
    """Those of some kinds, or all, in their order: the first `limit` of each kind, or the first `limit` groups of
    items that are scored together.

    Raises:
        UserError: there is none of these kinds.
    """
    present = dict.fromkeys(item.kind for item in items)
    if kinds and present.keys().isdisjoint(kinds):
        told = f"{name} has no question of kind {', '.join(kinds)}; it has {', '.join(present)}"
        raise UserError(f"evaluate.kinds: {told}")
    taken: set[tuple[str, str]] = set()
    counts: Counter[str] = Counter()
    for item in items:
        key = (item.kind, item.group or item.id)
        if (not kinds or item.kind in kinds) and key not in taken and (limit is None or counts[item.kind] < limit):
            taken.add(key)
            counts[item.kind] += 1
    return [item for item in items if (item.kind, item.group or item.id) in taken]
