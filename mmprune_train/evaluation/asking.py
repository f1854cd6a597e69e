"""A model asked many questions by one process or several; each batch is kept on disk, so a killed evaluation goes on.

Batches are the same whoever answers them and whenever, and each is seeded by itself, so neither a kill nor the number
of processes changes an answer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mmprune_train.benchmark.counters import peak_memory
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.data.templates import Template
from mmprune_train.evaluation.generate import Prediction, answer, batches, blank_images
from mmprune_train.evaluation.questions import Question
from mmprune_train.progress import progress
from mmprune_train.storage.atomic import append, unused_name
from mmprune_train.storage.files import json_text, rows_of, stamp_of
from mmprune_train.workers import ALONE, Ranks

Row = dict[str, Any]
"""An answer as it is kept."""


@dataclass
class Asker:
    """Asks a loaded model, under whichever pruner it has at the time."""

    model: Any
    """As `load_model` returns it."""
    processor: Any
    template: Template
    dtype: torch.dtype
    batch_size: int
    kept: Path
    """Folder for answers until `forget`."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides answers beside what is here: the weights, by `stamps`, and versions."""
    seed: int = 0
    """For scores that draw."""
    ranks: Ranks = ALONE
    title: str = "evaluate"
    """Stands before the progress."""
    passes: set[str] = field(default_factory=set)
    """Names of what was asked, for `forget`."""

    def __call__(
        self, questions: Sequence[Question], max_new_tokens: int, what: str = "", blank: bool = False
    ) -> list[Prediction]:
        """Answers in the order of the questions, on every rank.

        Args:
            what: stands behind the title.
            blank: with images of the mean colour in place of the questions' own.
        Raises:
            NotFinite: logits are NaN or infinite.
        """
        parts = list(batches(range(len(questions)), self.batch_size))
        name, title = self._name(questions, max_new_tokens, blank), f"{self.title}{what and f', {what}'}"
        self.passes.add(name)
        known = self._known(name)
        left = [n for n in self.ranks.share(range(len(parts))) if not known.keys() >= set(parts[n])]
        if known and self.ranks.rank == 0:
            print(f"{title}: goes on, {len(known):,} of {len(questions):,} questions were answered before", flush=True)
        images_of = self._blank() if blank else None

        def mine() -> dict[int, Row]:
            file = self.kept / f"{name}.{unused_name()}.jsonl"  # of this process: none writes behind a torn line
            for number in progress(left, title):
                asked = [questions[index] for index in parts[number]]
                found = self._batch(asked, number, max_new_tokens, images_of)
                rows = {index: _row(index, prediction) for index, prediction in zip(parts[number], found, strict=True)}
                append(file, "".join(json_text(row) + "\n" for row in rows.values()))
                known.update(rows)
            return {index: known[index] for n in self.ranks.share(range(len(parts))) for index in parts[n]}

        rows: dict[int, Row] = {}
        for found in self.ranks.each(mine):
            rows |= found
        return [
            Prediction(question, row["text"], row["counts"], row["seconds"], row["peak_bytes"])
            for question, row in ((question, rows[index]) for index, question in enumerate(questions))
        ]

    @property
    def pruner(self) -> str:
        """Name of the one that the model has now."""
        return self.model.pruner.settings.name

    def kept_share(self, questions: Sequence[Question], pruner: PrunerConfig) -> float:
        """As `visual_share` of questions with images, under a pruner."""
        with self.model.pruned_by(pruner):
            found = [
                prediction
                for number, part in enumerate(batches(questions, self.batch_size))
                for prediction in self._batch(part, number, 1, None)
            ]
        share = visual_share(found)
        assert share is not None
        return share

    def forget(self) -> None:
        """Delete the answers that were kept: the results hold them now."""
        for name in self.passes:
            for file in self.kept.glob(f"{name}.*.jsonl"):
                file.unlink(missing_ok=True)
        if self.kept.is_dir() and not any(self.kept.iterdir()):
            self.kept.rmdir()

    def _batch(
        self, questions: Sequence[Question], number: int, max_new_tokens: int, images_of: Callable[..., Any] | None
    ) -> list[Prediction]:
        """Answers of one batch, with what it took a question; memory of a GPU alone."""
        device, size, dtype = next(self.model.parameters()).device, len(questions), self.dtype
        torch.manual_seed(self.seed + number)
        began = time.perf_counter()

        def told() -> list[Prediction]:
            return answer(
                self.model, self.processor, self.template, questions, size, max_new_tokens, images_of, None, dtype
            )

        if device.type != "cuda":
            found, peak = told(), None
        else:
            with peak_memory(device) as memory:
                found = told()
            peak = memory.bytes
        seconds = (time.perf_counter() - began) / size
        return [replace(prediction, seconds=seconds, peak_bytes=peak) for prediction in found]

    def _blank(self) -> Callable[[Question], list[Any]]:
        processor = self.processor.image_processor
        size = processor.crop_size or processor.size
        return blank_images(processor.image_mean, size.get("height") or size.get("shortest_edge"))

    def _name(self, questions: Sequence[Question], max_new_tokens: int, blank: bool) -> str:
        """Hash of all that decides the answers."""
        decided = {
            **self.identity,
            "pruner": asdict(self.model.pruner.settings),
            "template": [type(self.template).__name__, self.processor.chat_template],
            "dtype": str(self.dtype),
            "exif_orientation": getattr(self.processor.image_processor, "exif_orientation", None),
            "batch_size": self.batch_size,
            "max_new_tokens": max_new_tokens,
            "blank": blank,
            "seed": self.seed,
        }
        told = hashlib.sha256(json_text(decided).encode())
        for question in questions:
            told.update(repr(question).encode(errors="surrogatepass"))
        return told.hexdigest()[:16]

    def _known(self, name: str) -> dict[int, Row]:
        """Answers of a pass that were kept, by the number of their question."""
        files = sorted(self.kept.glob(f"{name}.*.jsonl"))
        return {row["index"]: row for file in files for row in rows_of(file)}


def stamps(folder: Path | str) -> list[Any]:
    """What tells weights from others: a model folder's files, those in folders below it, too, with their sizes and
    times; of a projector's file itself and the config.json beside it; of a hub id, itself."""
    path = Path(folder).expanduser()
    files = [path, path.parent / "config.json"] if path.is_file() else sorted(path.rglob("*"))
    return [stamp_of(file) for file in files if file.is_file()] or [str(folder)]


def _row(index: int, prediction: Prediction) -> Row:
    told = {"text": prediction.text, "counts": prediction.counts}
    return {"index": index, **told, "seconds": prediction.seconds, "peak_bytes": prediction.peak_bytes}


def visual_share(predictions: Sequence[Prediction]) -> float | None:
    """Share of all visual tokens that enter an LLM layer, averaged over layers; None where no question has an image."""
    dense = sum(p.counts["visual_dense"] for p in predictions)
    return sum(p.counts["visual_layer_mean"] for p in predictions) / dense if dense else None


def costs(predictions: Sequence[Prediction]) -> dict[str, float | None]:
    """What the questions took: the share of visual tokens, seconds of one (median), and the most memory of a batch
    above the weights (of a GPU)."""
    peaks = [p.peak_bytes for p in predictions if p.peak_bytes is not None]
    return {
        "visual_keep_ratio": visual_share(predictions),
        "seconds": median(p.seconds for p in predictions),
        "peak_gib": max(peaks) / 2**30 if peaks else None,
    }
