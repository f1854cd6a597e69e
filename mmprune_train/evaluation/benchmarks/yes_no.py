"""POPE and MME: questions that are answered with yes or no."""

from __future__ import annotations

from pathlib import Path

from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.files import AGAIN, Folder, entries, lines
from mmprune_train.evaluation.benchmarks.item import Asked, Item, Loaded
from mmprune_train.evaluation.benchmarks.tables import Row
from mmprune_train.evaluation.metrics.mme import COGNITION, PERCEPTION

POPE_SPLITS = tuple("random popular adversarial".split())  # noqa: SIM905  (a list names a component)
PICTURES = (".jpg", ".png", ".jpeg")
REQUEST = "Please answer yes or no."
"""Ends every question of MME, and is not among those that LLaVA asks."""


def pope(folder: Folder, asked: Asked) -> Loaded:
    images = folder.images("val2014", "coco/val2014", "images")
    items, files, missing = list[Item](), list[Path](), list[str]()
    for split in POPE_SPLITS if asked.split is None else (asked.split,):
        name = f"coco_pope_{split}.json"
        if (path := folder.find(f"coco/{name}", name, f"output/coco/{name}")) is None:
            missing.append(f"there is no coco/{name} in {' or '.join(map(str, folder.places))}")
            continue
        files.append(path)
        for one in entries(path):
            label, image = one.text("label").lower(), images / one.text("image")
            prompt = asked.prompted(one.text("text"))
            number = f"{split}/{one.text('question_id')}"
            items.append(Item(number, (image,), prompt, (_yes_or_no(label, one.where),), split, split, one.where))
    if not files:
        raise NotHere(missing[0])
    return Loaded(items, files, tuple(missing))


def mme(folder: Folder, asked: Asked) -> Loaded:
    """A folder a task, with a text file a picture: two lines of a question, a tab and its answer."""
    release = "MME_Benchmark_release_version"
    base = folder.need(release, f"{release}/MME_Benchmark", "MME_Benchmark", "existence")
    base = base.parent if base.name == "existence" else base
    base = base / "MME_Benchmark" if (base / "MME_Benchmark").is_dir() else base
    items, files, missing = list[Item](), list[Path](), list[str]()
    for task in (*PERCEPTION, *COGNITION):
        if not (base / task).is_dir():
            missing.append(f"there is no task {task} in {base}")
            continue
        texts, pictures = base / task / "questions_answers_YN", base / task / "images"
        texts, pictures = (texts, pictures) if texts.is_dir() else (base / task, base / task)
        for text in sorted(texts.glob("*.txt")):
            files.append(text)
            items += _mme_pair(text, task, _picture(pictures, text.stem), asked)
    return Loaded(items, files, tuple(missing))


def _picture(folder: Path, stem: str) -> Path:
    return next((path for end in PICTURES if (path := folder / f"{stem}{end}").exists()), folder / f"{stem}.jpg")


def _mme_pair(text: Path, task: str, picture: Path, asked: Asked) -> list[Item]:
    pair = [(number, line) for number, line in enumerate(lines(text), 1) if line.strip()]
    if len(pair) != 2:
        raise UserError(f"{text}: two questions of a picture are expected, found {len(pair)}; {AGAIN}")
    items = []
    for number, line in pair:
        question, tab, answer = line.rpartition("\t")
        where = f"{text}, line {number}"
        if not tab:
            raise UserError(f"{where}: there is no tab between question and answer; {AGAIN}")
        prompt, answers = asked.prompted(_without_request(question)), (_yes_or_no(answer, where),)
        group = f"{task}/{text.stem}"
        items.append(Item(f"{group}/{number}", (picture,), prompt, answers, task, "test", where, group))
    return items


def _without_request(question: str) -> str:
    return question.strip().removesuffix(REQUEST).rstrip()


def _yes_or_no(answer: str, where: str) -> str:
    if (told := answer.strip().lower()) not in ("yes", "no"):
        raise UserError(f"{where}: the answer is {answer!r}, not yes or no; {AGAIN}")
    return told


def pope_row(row: Row, asked: Asked) -> list[Item]:
    """A row counts in each split that its category names, with commas between them."""
    prompt, answer = asked.prompted(_without_request(row.need("question"))), _yes_or_no(row.need("answer"), row.where)
    return [
        Item(f"{split}/{row.need('index')}", row.images, prompt, (answer,), split, split, row.where)
        for split in (row.get("category") or "all").split(",")
    ]


def mme_row(row: Row, asked: Asked) -> list[Item]:
    task = row.need("category")
    prompt, answer = asked.prompted(_without_request(row.need("question"))), _yes_or_no(row.need("answer"), row.where)
    return [
        Item(row.need("index"), row.images, prompt, (answer,), task, "test", row.where, group=f"{task}/{row.picture}")
    ]
