"""A small LLaVA-format folder of drawn squares, so that training is tested on real files without a network."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black")


def write_dataset(root: Path, images: int = 16) -> Path:
    """`pretrain.json`, `instruct.json` (one text-only and one two-image sample in it), `evaluate.json`, `images/`."""
    (root / "images").mkdir(parents=True)
    pretrain, instruct, evaluate = [], [], []
    for number in range(images):
        colour = COLOURS[number % len(COLOURS)]
        name = f"{number}.png"
        picture = Image.new("RGB", (48 + 4 * (number % 3), 48), "white")
        ImageDraw.Draw(picture).rectangle((10, 10, 30, 30), fill=colour)
        picture.save(root / "images" / name)
        pretrain.append(entry(f"p{number}", name, ["<image>\nDescribe it.", f"A {colour} square."]))
        ask = ["<image>\nWhat colour is it?", colour, "Is it red?", "yes" if colour == "red" else "no"]
        instruct.append(entry(f"i{number}", name, ask))
        evaluate.append(entry(f"o{number}", name, ask[:2], kind="open"))
        evaluate.append(entry(f"y{number}", name, ["<image>\n" + ask[2], ask[3]], kind="yes_no"))
    instruct.append(entry("text", None, ["What is two plus two?", "four"]))
    instruct.append(entry("pair", ["0.png", "1.png"], ["<image>\n<image>\nWhich colours?", "red and green"]))
    for name, entries in (("pretrain", pretrain), ("instruct", instruct), ("evaluate", evaluate)):
        (root / f"{name}.json").write_text(json.dumps(entries))
    return root


def entry(name: str, image: str | list[str] | None, said: list[str], **more: str) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": name, "conversations": turns, **({"image": image} if image else {}), **more}


def overrides(root: Path, runs: Path) -> list[str]:
    """The smoke experiment on that folder."""
    splits = [f"data.{s}.annotations={s}.json" for s in ("pretrain", "instruct", "evaluate")]
    splits += [f"data.{s}.images=images" for s in ("pretrain", "instruct", "evaluate")]
    return ["+experiment=smoke", "data=files", f"data.root={root}", *splits, f"runs_dir={runs}", "run_id=t"]
