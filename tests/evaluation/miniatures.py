"""Every public benchmark in its official layout, some questions each, about drawn pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

TASKS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
TEN = ["red"] * 6 + ["dark red"] * 3 + ["blue"]
"""Answers of ten annotators: `red` is right, `dark red` all but 0.1 of it, `blue` is not."""
COLOURS = ("red", "green", "blue", "black", "yellow")


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(colour, size))


def encoded(colour: str, size: tuple[int, int] = (48, 40)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def in_base64(colour: str) -> str:
    return base64.b64encode(encoded(colour)).decode()


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def put_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def vqav2(root: Path) -> None:
    questions, annotations = [], []
    for number in range(5):
        questions.append({"image_id": number, "question": f"What colour is it, {number}?", "question_id": 10 + number})
        answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(TEN, 1)]
        annotations.append({"question_id": 10 + number, "image_id": number, "answers": answers, "answer_type": "other"})
        picture(root / f"vqav2/val2014/COCO_val2014_{number:012d}.jpg", COLOURS[number])
        picture(root / f"vqav2/test2015/COCO_test2015_{number:012d}.jpg", COLOURS[number])
    put(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    put(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    asked = [
        {
            "question_id": q["question_id"],
            "image": f"COCO_test2015_{q['image_id']:012d}.jpg",
            "text": q["question"] + "\nx",
        }
        for q in questions
    ]
    put_lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", asked[:3])
    put_lines(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", asked)


def gqa(root: Path) -> None:
    questions = {}
    for number, (answer, kind) in enumerate([("yes", "verify"), ("red", "query"), ("left", "choose")] * 2):
        types = {"structural": kind, "semantic": "attr", "detailed": "x"}
        questions[f"0{number}"] = {
            "question": f"Is it {number}?",
            "imageId": f"n{number}",
            "answer": answer,
            "types": types,
        }
        picture(root / f"gqa/data/images/n{number}.jpg")
    put(root / "gqa/data/testdev_balanced_questions.json", questions)


def vizwiz(root: Path) -> None:
    rows = []
    for number in range(5):
        answers = [{"answer": answer, "answer_confidence": "yes"} for answer in TEN]
        question = "What is this? And what color is it?"
        name = f"VizWiz_val_{number:08d}.jpg"
        rows.append({"image": name, "question": question, "answers": answers, "answer_type": "other", "answerable": 1})
        picture(root / "vizwiz/val" / name)
        picture(root / "vizwiz/test" / name.replace("val", "test"))
    put(root / "vizwiz/val.json", rows)
    test = [{"image": row["image"].replace("val", "test"), "question": row["question"]} for row in rows]
    put(root / "vizwiz/test.json", test)


def textvqa(root: Path) -> None:
    data, lines = [], []
    for number in range(5):
        image, question = f"a{number}", f"what is the brand of this Camera {number}?"
        data.append({"question": question, "image_id": image, "question_id": 34602 + number, "answers": TEN})
        text = f"{question.capitalize()}\nReference OCR token: DAKOTA, DIGITAL\nAnswer the question using ..."
        lines.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
        picture(root / f"textvqa/train_images/{image}.jpg")
    put(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
    put_lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", lines)


def scienceqa(root: Path) -> None:
    problems: dict[str, Any] = {}
    for number in range(6):
        image = "image.png" if number % 2 else None
        hint = "Select the better estimate." if number % 3 == 0 else ""
        problems[str(number)] = {
            "question": f"Which one, {number}?", "choices": ["this", "that", "neither"][: 2 + number % 2],
            "answer": number % 2, "hint": hint, "image": image, "lecture": "", "solution": "",
        }  # fmt: skip
        if image:
            picture(root / f"scienceqa/images/test/{number}/image.png")
    put(root / "scienceqa/problems.json", problems)
    put(root / "scienceqa/pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def pope(root: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": f"COCO_val2014_{n // 2}.jpg", "text": f"Is there a {split} {n} in the image?",
             "label": ("yes", "no")[n % 2]}
            for n in range(6)
        ]  # fmt: skip
        put_lines(root / f"pope/coco/coco_pope_{split}.json", rows)
    for n in range(3):
        picture(root / f"pope/val2014/COCO_val2014_{n}.jpg", COLOURS[n])


def mme(root: Path) -> None:
    base = root / "MME/MME_Benchmark_release_version"
    for task in TASKS:
        apart = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for number in range(2):
            texts, images = (
                (base / task / "questions_answers_YN", base / task / "images") if apart else (base / task,) * 2
            )
            texts.mkdir(parents=True, exist_ok=True)
            picture(images / f"{number}.{'png' if number else 'jpg'}")
            ask = "Please answer yes or no."
            (texts / f"{number}.txt").write_text(f"Is it a {task}?  {ask}\tYes\nIs it none? {ask}\tNo")


def _mmbench_rows(questions: Sequence[str], hint: str) -> list[dict[str, Any]]:
    options, rows = ["red", "green", "blue"], []
    for number, question in enumerate(questions):
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": number + turn * 10**6, "question": question,
                    "hint": hint if number == 0 else "",
                    **dict(zip("ABCD", [*turned, ""], strict=True)), "answer": "ABC"[turned.index(options[number])],
                    "category": ("coarse", "fine")[number % 2], "image": in_base64(COLOURS[number]),
                    "source": "x", "l2-category": "y", "comment": "", "split": "dev",
                }
            )  # fmt: skip
    return rows


def put_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mmbench(root: Path) -> None:
    rows = _mmbench_rows(['Which colour\tis "it"?', "And\nthis?", "Last?"], "A picture is shown.")
    put_table(root / "mmbench/mmbench_dev_20230712.tsv", rows)


def mmbench_cn(root: Path) -> None:
    put_table(root / "mmbench_cn/mmbench_dev_cn_20231003.tsv", _mmbench_rows(["什么颜色？", "这个呢？"], "看图。"))


def seed(root: Path) -> None:
    questions: list[dict[str, Any]] = [
        {
            "answer": "ABCD"[n % 4],
            **{f"choice_{c}": f"{c}{n}" for c in "abcd"},
            "data_id": f"{n}_x",
            "data_type": "image",
            "question": f"What is it, {n}?",
            "question_id": str(100 + n),
            "question_type_id": 1 + n % 2,
        }
        for n in range(6)
    ]
    questions.append({**questions[0], "data_type": "video", "question_id": "v1", "question_type_id": 10})
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    put(root / "seed_bench/SEED-Bench.json", {"questions": questions, "question_type": types})
    for n in range(6):
        picture(root / f"seed_bench/SEED-Bench-image/{n}_x")


def mmvet(root: Path) -> None:
    found = {
        f"v1_{n}": {"imagename": f"v1_{n}.png", "question": "What is x in the equation?", "answer": "-1<AND>-5",
                    "imagesource": "x", "capability": ["ocr", "math"]}
        for n in range(5)
    }  # fmt: skip
    put(root / "mm-vet/mm-vet.json", found)
    for n in range(5):
        picture(root / f"mm-vet/images/v1_{n}.png", COLOURS[n])


def refcoco(root: Path) -> None:
    def entry(number: int) -> dict[str, Any]:
        picture(root / f"refcoco/train2014/COCO_train2014_{number}.jpg", COLOURS[number], (80, 40))
        return {"height": 40, "width": 80, "bbox": [10, 10, 50, 30], "image": f"x/COCO_train2014_{number}.jpg"}

    put_lines(root / "refcoco/refcoco_val.jsonl", [{**entry(n), "sent": f"the left one {n}"} for n in range(3)])
    shikra = {**entry(3), "expression": "a man"}
    put_lines(root / "refcoco/REC_refcocog_umd_test.jsonl", [{**shikra, "img_path": shikra.pop("image")}])
    corner = {"img_id": "COCO_train2014_4", "sents": "a dog", "height": 40, "width": 80, "bbox": [10, 10, 40, 20]}
    entry(4)
    put(root / "refcoco/refcoco+_testA.json", [corner])


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2, "gqa": gqa, "vizwiz": vizwiz, "scienceqa": scienceqa, "textvqa": textvqa, "pope": pope, "mme": mme,
    "mmbench": mmbench, "mmbench_cn": mmbench_cn, "seed": seed, "mmvet": mmvet, "refcoco": refcoco,
}  # fmt: skip


def write_all(root: Path) -> Path:
    for write in WRITERS.values():
        write(root)
    return root
