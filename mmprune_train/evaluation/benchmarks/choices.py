"""ScienceQA, MMBench, MMBench-CN and SEED-Bench: questions that are answered with an option's letter."""

from __future__ import annotations

from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.files import AGAIN, Entry, Folder, by_key, read_json
from mmprune_train.evaluation.benchmarks.item import Asked, Item, Loaded, lettered, with_options
from mmprune_train.evaluation.benchmarks.short_answers import first_split
from mmprune_train.evaluation.benchmarks.tables import Row, read_rows

ROTATION = 10**6
"""MMBench's index of a rotated question is that of the question and a multiple of this."""
MMBENCH_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "": {
        "dev": ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev_en_20231003.tsv"),
        "test": ("mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv", "mmbench_test_en_20231003.tsv"),
    },
    "cn": {
        "dev": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
        "test": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
    },
}


def scienceqa(folder: Folder, asked: Asked) -> Loaded:
    """`problems.json` and `pid_splits.json`; questions with an image and without are asked."""
    problems, splits = folder.need("problems.json"), folder.need("pid_splits.json")
    split = asked.split or "test"
    known, found = Entry(read_json(splits), str(splits)), by_key(problems)
    items = []
    for number in known.texts(split):
        if (one := found.get(number)) is None:
            raise UserError(f"{splits}: problem {number} of {split} is not in {problems}; get both files again")
        options, answer = lettered(one.texts("choices")), one.of("answer", kinds=(int,))
        if not 0 <= answer < len(options):
            raise UserError(f"{one.where}: answer {answer} of {len(options)} choices; {AGAIN}")
        name, hint = one.values.get("image"), str(one.values.get("hint") or "")
        images = (folder.images(f"images/{split}", split) / number / str(name),) if name else ()
        prompt = asked.prompted(with_options(one.text("question"), options, hint and f"Context: {hint}"))
        kind, letter = "image" if name else "text", list(options)[answer]
        items.append(Item(number, images, prompt, (letter,), kind, split, one.where, options=options))
    return Loaded(items, [problems, splits])


def mmbench(folder: Folder, asked: Asked, language: str = "") -> Loaded:
    """The official TSV, whose rows have the rotations of a question where evaluation is circular."""
    split, path = first_split(folder, asked, MMBENCH_FILES[language])
    items = [_choice(row, asked, split, rotates=True) for row in read_rows(path)]
    return Loaded(items, [path])


def mmbench_cn(folder: Folder, asked: Asked) -> Loaded:
    return mmbench(folder, asked, "cn")


def seed(folder: Folder, asked: Asked) -> Loaded:
    """The questions about images in `SEED-Bench.json`; those on videos are left out, and counted in a note."""
    path = folder.need("SEED-Bench.json")
    images = folder.images("SEED-Bench-image", "images")
    whole = Entry(read_json(path), str(path))
    types = {str(number): name for name, number in whole.of("question_type", kinds=(dict,)).items()}
    items, videos = list[Item](), 0
    for one in whole.list_of("questions"):
        if one.text("data_type") != "image":
            videos += 1
            continue
        options = {letter: one.text(f"choice_{letter.lower()}") for letter in "ABCD"}
        kind = types.get(one.text("question_type_id"), one.text("question_type_id"))
        prompt = asked.prompted(with_options(one.text("question"), options))
        answers = (_letter(one.text("answer"), options, one.where),) if "answer" in one.values else ()
        image = images / one.text("data_id")
        items.append(
            Item(one.text("question_id"), (image,), prompt, answers, kind, "image", one.where, options=options)
        )
    if not items:
        raise NotHere(f"{path} has no question about an image")
    return Loaded(items, [path], (f"{videos:,} questions about videos are not asked",) if videos else ())


def choice_row(row: Row, asked: Asked) -> list[Item]:
    return [_choice(row, asked, row.get("split"))]


def mmbench_row(row: Row, asked: Asked) -> list[Item]:
    """With the rotations of a question."""
    return [_choice(row, asked, row.get("split"), rotates=True)]


def scienceqa_row(row: Row, asked: Asked) -> list[Item]:
    """As `choice_row`, by whether there is an image, and with the context as ScienceQA's own files have it asked."""
    options, hint = row.options, row.get("hint")
    prompt = asked.prompted(with_options(row.need("question"), options, hint and f"Context: {hint}"))
    answers = (_letter(row.need("answer"), options, row.where),)
    kind = "image" if row.images else "text"
    return [Item(row.need("index"), row.images, prompt, answers, kind, row.get("split"), row.where, options=options)]


def _choice(row: Row, asked: Asked, split: str, rotates: bool = False) -> Item:
    options, answer, index = row.options, row.get("answer"), row.need("index")
    if not options:
        raise UserError(f"{row.where}: there is nothing in column A; {AGAIN}")
    prompt = asked.prompted(with_options(row.need("question"), options, row.get("hint")))
    answers = (_letter(answer, options, row.where),) if answer else ()
    group = str(int(index) % ROTATION) if rotates and index.isdecimal() else index
    kind = row.get("category") or "all"
    return Item(index, row.images, prompt, answers, kind, split, row.where, group, options, extra={"row": row.cells})


def _letter(answer: str, options: dict[str, str], where: str) -> str:
    if answer not in options:
        raise UserError(f"{where}: answer {answer!r} is none of the options {', '.join(options)}; {AGAIN}")
    return answer
