"""All benchmarks: which files each is read from, what is asked, how it is scored.

A new one is an entry here, its name in `config/task_schema.py`, and a reader of its files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmprune_train.evaluation.benchmarks import (
    choices,
    free_answers,
    regions,
    scoring,
    short_answers,
    submissions,
    yes_no,
)
from mmprune_train.evaluation.benchmarks.files import Folder
from mmprune_train.evaluation.benchmarks.item import QUESTION, Asked, Item, Loaded
from mmprune_train.evaluation.benchmarks.scoring import Metric
from mmprune_train.evaluation.benchmarks.submissions import Submit
from mmprune_train.evaluation.benchmarks.tables import Row

SHORT = f"{QUESTION}\nAnswer the question using a single word or phrase."
LETTER = f"{QUESTION}\nAnswer with the option's letter from the given choices directly."
LETTER_CN = f"{QUESTION}\n请直接回答选项字母。"
UNANSWERABLE = f"{QUESTION}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
REGION = f"Please provide the bounding box coordinate of the region this sentence describes: {QUESTION}"
COCO = "images: http://images.cocodataset.org/zips/"


@dataclass(frozen=True)
class Benchmark:
    title: str
    folders: tuple[str, ...]
    """Names of its folder in `evaluate.root`."""
    load: Callable[[Folder, Asked], Loaded]
    """From the official files."""
    row: Callable[[Row, Asked], list[Item]]
    """From a row of a TSV."""
    tables: tuple[str, ...]
    """Names of the TSV."""
    prompt: str
    metric: Metric | None
    """None: a judge scores the answers."""
    get: str
    """Where its files come from."""
    submit: Submit | None = None
    """Writes what a server or judge takes."""
    new_tokens: int = 16
    """That an answer has at most, where `evaluate.max_new_tokens` is not given."""
    together: int | None = None
    """Items that every group has."""


BENCHMARKS = {
    "vqav2": Benchmark(
        "VQAv2", ("vqav2",), short_answers.vqav2, short_answers.annotated_row, ("VQAv2.tsv", "vqav2.tsv"),
        SHORT, scoring.VQA, f"https://visualqa.org/download.html; {COCO}{{val2014,test2015}}.zip", submissions.vqav2,
    ),
    "gqa": Benchmark(
        "GQA", ("gqa",), short_answers.gqa, short_answers.row, ("GQA_TestDev_Balanced.tsv", "gqa.tsv"),
        SHORT, scoring.GQA, "https://cs.stanford.edu/people/dorarad/gqa/download.html", submissions.gqa,
    ),
    "vizwiz": Benchmark(
        "VizWiz", ("vizwiz",), short_answers.vizwiz, short_answers.annotated_row, ("VizWiz.tsv", "vizwiz.tsv"),
        UNANSWERABLE + SHORT.removeprefix(f"{QUESTION}\n"), scoring.EVALAI,
        "https://vizwiz.org/tasks-and-datasets/vqa/", submissions.vizwiz,
    ),
    "scienceqa": Benchmark(
        "ScienceQA", ("scienceqa",), choices.scienceqa, choices.scienceqa_row, ("ScienceQA_TEST.tsv", "scienceqa.tsv"),
        LETTER, scoring.SCIENCEQA, "data/scienceqa of https://github.com/lupantech/ScienceQA",
    ),
    "textvqa": Benchmark(
        "TextVQA", ("textvqa",), short_answers.textvqa, short_answers.textvqa_row, ("TextVQA_VAL.tsv", "textvqa.tsv"),
        SHORT, scoring.EVALAI,
        "https://textvqa.org/dataset; OCR tokens: eval.zip of LLaVA's docs/Evaluation.md",
    ),
    "pope": Benchmark(
        "POPE", ("pope", "POPE"), yes_no.pope, yes_no.pope_row, ("POPE.tsv", "pope.tsv"),
        SHORT, scoring.POPE, f"output/coco of https://github.com/AoiDragon/POPE; {COCO}val2014.zip",
    ),
    "mme": Benchmark(
        "MME", ("MME", "mme"), yes_no.mme, yes_no.mme_row, ("MME.tsv", "mme.tsv"),
        SHORT, scoring.MME,
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation", together=2,
    ),
    "mmbench": Benchmark(
        "MMBench", ("mmbench", "MMBench"), choices.mmbench, choices.mmbench_row, ("MMBench.tsv", "mmbench.tsv"),
        LETTER, scoring.MMBENCH, "https://github.com/open-compass/MMBench#download", submissions.mmbench,
    ),
    "mmbench_cn": Benchmark(
        "MMBench-CN", ("mmbench_cn", "mmbench", "MMBench"), choices.mmbench_cn, choices.mmbench_row,
        ("MMBench_CN.tsv", "mmbench_cn.tsv"),
        LETTER_CN, scoring.MMBENCH, "https://github.com/open-compass/MMBench#download", submissions.mmbench,
    ),
    "seed": Benchmark(
        "SEED-Bench, images", ("seed_bench", "SEED-Bench", "seed"), choices.seed, choices.choice_row,
        ("SEEDBench_IMG.tsv", "seed.tsv"),
        LETTER, scoring.SEED, "https://huggingface.co/datasets/AILab-CVC/SEED-Bench", submissions.seed,
    ),
    "mmvet": Benchmark(
        "MM-Vet", ("mm-vet", "mmvet"), free_answers.mmvet, free_answers.mmvet_row, ("MMVet.tsv", "mmvet.tsv"),
        QUESTION, None, "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip", submissions.mmvet, 1024,
    ),
    "refcoco": Benchmark(
        "RefCOCO, RefCOCO+, RefCOCOg", ("refcoco", "RefCOCO", "refer"), regions.refcoco, regions.refcoco_row,
        ("RefCOCO.tsv", "refcoco.tsv"),
        REGION, scoring.REFCOCO,
        f"https://github.com/lichengunc/refer, or lists of Qwen-VL or Shikra; {COCO}train2014.zip", new_tokens=48,
    ),
}  # fmt: skip
