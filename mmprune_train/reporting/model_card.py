"""The model card of an exported folder: what it is made of, how it was trained, what it reached, its licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

UNKNOWN = "not stated"
USES = {
    "hf": """```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("FOLDER")  # dense: transformers knows no pruner
processor = AutoProcessor.from_pretrained("FOLDER")
```

```python
from mmprune_train import load_model

model, processor = load_model("FOLDER")  # pruned, as it was trained
```""",
    "llava": """LLaVA's own code loads this folder as `model_path` (its name must have `llava` in it), with the vision
tower that `mm_vision_tower` of config.json names; `mm_projector.bin` is the projector alone, for its `model_base`.

```python
from mmprune_train import load_model

model, processor = load_model("FOLDER")  # pruned, as it was trained
```""",
    "adapter": """```python
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

base = LlavaForConditionalGeneration.from_pretrained("BASE")
base.model.multi_modal_projector.load_state_dict(load_file("FOLDER/projector.safetensors"))
model = PeftModel.from_pretrained(base, "FOLDER")
```

`base.json` has the SHA-256 of the weights that the adapters belong to; `mmprune task=export ckpt=FOLDER
export.out=MERGED` folds them in, and refuses other weights.""",
}
"""How a folder of each format is loaded."""


@dataclass(frozen=True)
class Card:
    """What a model card tells."""

    title: str
    format: str
    license: str | None = None
    bases: Mapping[str, str] = field(default_factory=dict)
    """Part of the network -> where its weights came from."""
    datasets: Mapping[str, str] = field(default_factory=dict)
    """Training stage -> its data."""
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Training stage -> setting or result -> value."""
    pruner: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the pruner by key."""
    metrics: str = ""
    """Tables of the evaluations; empty: there is none."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """Versions, seed, commit, dtype, parity."""
    notes: Sequence[str] = ()
    """What engines make of this folder."""


def model_card(card: Card) -> str:
    """The card as Markdown, with the front matter by which hubs sort models."""
    front: dict[str, Any] = {
        "license": card.license or "unknown",
        "pipeline_tag": "image-text-to-text",
        "library_name": "peft" if card.format == "adapter" else "transformers",
        "tags": ["llava", "visual-token-pruning", "mmprune_train"],
    }
    if named := [base for base in card.bases.values() if base.count("/") == 1 and not base.startswith(("/", "."))]:
        front["base_model"] = named
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n", f"# {card.title}\n"]
    parts += ["## Use\n", USES[card.format] + "\n", *(f"- {note}" for note in card.notes), ""]
    parts += ["## Made of\n", _rows(card.bases, "part", "weights")]
    parts += ["## Recipe\n", _stages(card.stages)]
    parts += ["## Data\n", _rows(card.datasets, "training stage", "data")]
    parts += ["## Pruner\n", _rows(card.pruner, "key", "value")]
    parts += ["## Metrics\n", f"```\n{card.metrics}\n```\n" if card.metrics else "This run has no evaluation.\n"]
    licences = {"these weights": card.license or UNKNOWN}
    published = {part: base for part, base in card.bases.items() if ": random, seed" not in base}
    licences |= {f"{part} ({base})": "as its publisher states" for part, base in published.items()}
    licences |= {f"data of {stage} ({name})": "as its publisher states" for stage, name in card.datasets.items()}
    told = "Weights carry the terms of what they were made from; this card has checked none of them."
    parts += ["## Licences\n", _rows(licences, "of", "licence"), f"{told}\n"]
    parts += ["## Made with\n", _rows(card.made, "what", "value")]
    return "\n".join(parts).rstrip() + "\n"


def _rows(found: Mapping[str, Any], left: str, right: str) -> str:
    if not found:
        return "Not known.\n"
    return _markdown([left, right], [[name, value] for name, value in found.items()])


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    if not stages:
        return "Not known.\n"
    keys = list(dict.fromkeys(key for stage in stages.values() for key in stage))
    return _markdown(["", *stages], [[key, *(stage.get(key) for stage in stages.values())] for key in keys])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
