"""VQAv2, GQA, VizWiz and TextVQA: questions that are answered with a word or a phrase."""

from __future__ import annotations

from pathlib import Path

from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.files import AGAIN, Entry, Folder, by_key, entries, read_json
from mmprune_train.evaluation.benchmarks.item import Asked, Item, Loaded
from mmprune_train.evaluation.benchmarks.tables import Row

VQA_SPLITS = ("val", "test-dev", "test")
VIZWIZ_SPLITS = ("val", "test")


def vqav2(folder: Folder, asked: Asked) -> Loaded:
    """The official question and annotation files; of a test split also LLaVA's `llava_vqav2_mscoco_*.jsonl`."""
    names = {
        "val": ("v2_OpenEnded_mscoco_val2014_questions.json",),
        "test-dev": (
            "v2_OpenEnded_mscoco_test-dev2015_questions.json",
            "llava_vqav2_mscoco_test-dev2015.jsonl",
        ),
        "test": ("v2_OpenEnded_mscoco_test2015_questions.json", "llava_vqav2_mscoco_test2015.jsonl"),
    }
    split, path = first_split(folder, asked, names)
    year = "val2014" if split == "val" else "test2015"
    images, files = folder.images(year, f"images/{year}"), [path]
    answers = {}
    if split == "val":
        annotations = folder.need("v2_mscoco_val2014_annotations.json")
        files.append(annotations)
        for one in Entry(read_json(annotations), str(annotations)).list_of("annotations"):
            answers[one.text("question_id")] = one
    items = []
    for one in _questions(path):
        number = one.text("question_id")
        name = one.values.get("image") or f"COCO_{year}_{int(one.text('image_id')):012d}.jpg"
        known = answers.get(number)
        if answers and known is None:
            raise UserError(f"{one.where}: {files[1].name} has no question {number}; get both files again")
        told = () if known is None else tuple(a.text("answer") for a in known.list_of("answers"))
        kind = "" if known is None else str(known.values.get("answer_type", ""))
        prompt = asked.prompted(_bare_question(one))
        items.append(Item(number, (images / name,), prompt, told, kind or "all", split, one.where))
    return Loaded(items, files, others=() if split == "val" else _other_ids(folder, items))


def _questions(path: Path) -> list[Entry]:
    if path.suffix == ".jsonl":
        return list(entries(path))
    return Entry(read_json(path), str(path)).list_of("questions")


def _bare_question(one: Entry) -> str:
    """Of LLaVA's files the first line, without the instruction that follows."""
    return one.text("question") if "question" in one.values else one.text("text").partition("\n")[0]


def _other_ids(folder: Folder, items: list[Item]) -> tuple[int, ...]:
    """All ids of the test set, of which the server wants an answer each where test-dev alone is asked, too."""
    whole = folder.find("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json")
    if whole is None:
        return ()
    have = {item.id for item in items}
    return tuple(int(one.text("question_id")) for one in _questions(whole) if one.text("question_id") not in have)


def gqa(folder: Folder, asked: Asked) -> Loaded:
    name = "testdev_balanced_questions.json"
    path = folder.need(
        f"data/{name}", name, f"data/questions1.2/{name}", f"questions1.2/{name}", f"data/questions/{name}"
    )
    images = folder.images("data/images", "images")
    items = []
    for number, one in by_key(path).items():
        types = one.of("types", kinds=(dict,)) if "types" in one.values else {}
        image = images / f"{one.text('imageId')}.jpg"
        prompt, kind = asked.prompted(one.text("question")), str(types.get("structural", "all"))
        items.append(Item(number, (image,), prompt, (one.text("answer"),), kind, "testdev_balanced", one.where))
    return Loaded(items, [path])


def vizwiz(folder: Folder, asked: Asked) -> Loaded:
    """`val.json` or `test.json`; of the test split also LLaVA's `llava_test.jsonl`."""
    names = {
        "val": ("val.json", "Annotations/val.json"),
        "test": ("test.json", "llava_test.jsonl", "Annotations/test.json"),
    }
    split, path = first_split(folder, asked, names)
    images = folder.images(split, f"images/{split}")
    items = []
    for one in entries(path):
        image = one.text("image")
        told = tuple(a.text("answer") for a in one.list_of("answers")) if "answers" in one.values else ()
        prompt = asked.prompted(_bare_question(one).capitalize())
        kind = str(one.values.get("answer_type", "all"))
        items.append(Item(image, (images / image,), prompt, told, kind, split, one.where))
    return Loaded(items, [path])


def textvqa(folder: Folder, asked: Asked) -> Loaded:
    """`TextVQA_0.5.1_val.json`, and LLaVA's question file for its OCR tokens."""
    path = folder.need("TextVQA_0.5.1_val.json")
    images = folder.images("train_images", "train_val_images/train_images", "images")
    files, tokens = [path], dict[tuple[str, str], str]()
    if asked.ocr_tokens:
        try:
            files.append(folder.need("llava_textvqa_val_v051_ocr.jsonl"))
        except NotHere as error:
            raise NotHere(f"{error}, which has the OCR tokens (evaluate.ocr_tokens=false asks without)") from None
        for line in entries(files[1]):
            question, *more = line.text("text").split("\n")
            told = [one for one in more if one.startswith("Reference OCR token:")]
            tokens[line.text("question_id"), question.lower()] = told[0] if told else ""
    items = []
    for one in Entry(read_json(path), str(path)).list_of("data"):
        question, image = one.text("question").capitalize(), one.text("image_id")
        if asked.ocr_tokens:
            if (key := (image, question.lower())) not in tokens:
                raise UserError(f"{one.where}: {files[1].name} has no such question of image {image}; get both again")
            question = f"{question}\n{tokens[key]}"
        answers = tuple(one.texts("answers")) if "answers" in one.values else ()
        prompt = asked.prompted(question)
        items.append(
            Item(one.text("question_id"), (images / f"{image}.jpg",), prompt, answers, "all", "val", one.where)
        )
    return Loaded(items, files)


def first_split(folder: Folder, asked: Asked, names: dict[str, tuple[str, ...]]) -> tuple[str, Path]:
    """The split that is asked for, else the first of which a file is there, with that file."""
    if asked.split is not None and asked.split not in names:
        raise UserError(f"evaluate.splits: there is no split {asked.split}; one of {', '.join(names)}")
    for split in names if asked.split is None else (asked.split,):
        if (path := folder.find(*names[split])) is not None:
            return split, path
    usual = " or ".join(names[split][0] for split in ([asked.split] if asked.split else names))
    raise NotHere(f"there is no {usual} in {' or '.join(map(str, folder.places))}")


def row(row: Row, asked: Asked) -> list[Item]:
    """One reference answer, or all the annotators' as a list."""
    question, kind = row.need("question"), row.get("category") or row.get("split") or "all"
    where, split = row.where, row.get("split")
    return [Item(row.need("index"), row.images, asked.prompted(question), row.answers, kind, split, where)]


def annotated_row(cells: Row, asked: Asked) -> list[Item]:
    """With several annotators' answers, without which none can be left out."""
    if len(cells.answers) == 1:
        raise UserError(f"{cells.where}: answer is one text, where a list of all annotators' is scored; {AGAIN}")
    return row(cells, asked)


def textvqa_row(cells: Row, asked: Asked) -> list[Item]:
    """Without OCR tokens, which no table has."""
    if asked.ocr_tokens:
        raise NotHere(
            f"{cells.where}: TextVQA is asked with OCR tokens, which a table does not have; give "
            "evaluate.ocr_tokens=false to ask without, or get TextVQA_0.5.1_val.json and LLaVA's question file"
        )
    return annotated_row(cells, asked)
