"""Images, packed batches and the order of samples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmprune_train.config.schema import EncoderConfig, StageConfig
from mmprune_train.data.batch import collate
from mmprune_train.data.dataset import ConversationDataset
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.data.loader import TrainLoader, train_loader
from mmprune_train.data.records import read_annotations
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.packed.sequence import IGNORE, Kind

ENCODER = EncoderConfig(name="tiny", image_size=16, patch_size=8)
PATCHES = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and samples with one of them, with two, with none."""
    for number, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (20 + 12 * number, 20), colour).save(tmp_path / f"{number}.png")

    def sample(name: str, images: list[str], answer: str) -> dict:
        question = "<image>" * len(images) + "what is it?"
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": talk, **({"image": images} if images else {})}

    samples = [
        sample("one", ["0.png"], "a red shape"),
        sample("two", ["1.png", "0.png"], "no"),
        sample("none", [], "yes"),
        sample("three", ["2.png"], "blue"),
    ] * 4
    (tmp_path / "a.json").write_text(json.dumps(samples))
    return tmp_path


def dataset(folder: Path, max_length: int = 512, template: str = "v1") -> ConversationDataset:
    tokenizer = tiny_tokenizer()
    reader = ImageReader(image_processor(ENCODER, "square"))
    records = read_annotations(folder / "a.json", folder).records
    return ConversationDataset(records, get_template(template, tokenizer), tokenizer, reader, PATCHES, max_length)


def test_what_is_cut_is_counted(folder: Path) -> None:
    lengths = [len(example.ids) for example in (sample.example for sample in dataset(folder).read([0, 1, 2, 3]))]
    longest = max(lengths)
    batch = collate(dataset(folder, longest - 1).read([0, 1, 2, 3]))
    assert batch.truncated == (lengths.count(longest), lengths.count(longest))
    assert collate(dataset(folder, longest).read([0, 1])).truncated == (0, 0)


def test_samples_that_cannot_be_trained_are_told_beforehand_and_few_are_tokenised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(*texts: str) -> dict[str, object]:
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        return {"id": texts[0], "conversations": turns}

    long = [talk("short", "answer " * 400), talk("question " * 200, "a"), talk("q", "a", "r", "b")]
    (folder / "a.json").write_text(json.dumps(long))
    with pytest.raises(UserError, match=r"\[1\] .* exceed max_length=512, and nothing that is trained on is left"):
        dataset(folder).check_cuts()
    with pytest.raises(UserError, match=r"\[2\] .*the plain template takes one turn, found 2"):
        dataset(folder, template="plain").check_cuts()
    read: list[str] = []
    monkeypatch.setattr("mmprune_train.data.dataset.encode", lambda record, *_: read.append(record.where))
    dataset(folder).check_cuts()
    assert read == [f"{folder / 'a.json'}[1]"]


def test_a_batch_is_its_samples_one_after_the_other(folder: Path) -> None:
    samples = dataset(folder).read([0, 1, 2])
    batch = collate(samples)
    s = batch.sequence
    lengths = [len(sample.example.ids) for sample in samples]
    assert s.samples == 3 and s.lengths.tolist() == lengths and batch.ids == ["one", "two", "none"]
    assert s.position.tolist() == [k for length in lengths for k in range(length)]
    assert s.slot.tolist() == list(range(sum(lengths)))
    for number, sample in enumerate(samples):
        mine = s.segment == number
        assert torch.equal(s.ids[mine], sample.example.ids) and torch.equal(s.turn[mine], sample.example.turn)
        assert torch.equal(s.target[mine][:-1], sample.example.labels[1:])
        assert s.target[mine][-1] == IGNORE
    assert batch.supervised == sum(sample.example.supervised for sample in samples) > 0


def test_samples_of_one_image_share_its_pixels_and_every_patch_knows_its_place(folder: Path) -> None:
    batch = collate(dataset(folder).read([0, 1, 2, 3]))
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (3, 3, 16, 16) and batch.pixel_values.dtype == torch.float32
    s = batch.sequence
    visual = s.kind == Kind.VISUAL
    patches = list(range(PATCHES))
    assert s.image[visual].tolist() == [row for row in (0, 1, 0, 2) for _ in patches]
    assert s.patch[visual].tolist() == patches * 4
    assert set(s.image[~visual].tolist()) == set(s.patch[~visual].tolist()) == {-1}
    assert batch.pixel_values[0, 0].mean() > batch.pixel_values[1, 0].mean()  # red before green


def test_pixels_move_and_the_sequence_stays_on_the_host(folder: Path) -> None:
    moved = collate(dataset(folder).read([0])).to("meta")
    assert moved.pixel_values.device.type == "meta" and moved.sequence.ids.device.type == "cpu"
    text = collate(dataset(folder).read([2])).to("meta")
    assert text.pixel_values is None and not text.sequence.visual.any()


def test_an_image_is_read_once_for_a_batch(folder: Path) -> None:
    data = dataset(folder)
    read: Counter[str] = Counter()
    reader = data.reader
    data.reader = lambda path, sample: (read.update([path.name]), reader(path, sample))[1]
    data.read([0, 1, 4, 5])
    assert read == {"0.png": 1, "1.png": 1}


def test_missing_and_damaged_images_name_sample_and_file(folder: Path) -> None:
    data = dataset(folder)
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.json\[0\] \(id one\): image .*0\.png cannot be read"):
        data.read([0])
    (folder / "2.png").unlink()
    with pytest.raises(UserError, match=r"\(id three\): image .*2\.png is missing"):
        data.read([3])


def test_pad_shows_the_whole_image_on_the_mean_colour_and_square_its_middle() -> None:
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 4, 16))
    pad, square = (
        image_processor(ENCODER, ratio)(image, return_tensors="pt")["pixel_values"][0] for ratio in ("pad", "square")
    )
    assert pad.shape == square.shape == (3, 16, 16)
    assert pad[:, 1].abs().max() < 0.02  # the mean colour is 0 after normalisation, up to int(mean x 255)
    assert pad[0, 8, 0] < -1 and pad[0, 8, 8] > 1
    assert (square > 1).all()  # the black edge is cut away
    with pytest.raises(UserError, match="choose square or pad"):
        image_processor(ENCODER, "wide")


def loader(folder: Path, num_workers: int = 0, rank: int = 0, world: int = 1) -> TrainLoader:
    data = dataset(folder)
    sizes = {"max_length": 512, "batch_size": 4 // world, "global_batch_size": 8, "samples_per_image": 2}
    return train_loader(
        data.records,
        data.template,
        data.tokenizer,
        data.reader,
        PATCHES,
        StageConfig(**sizes, group_by_modality=True),
        seed=5,
        rank=rank,
        world=world,
        num_workers=num_workers,
    )


def test_a_stage_can_be_entered_anywhere_with_the_same_batches(folder: Path) -> None:
    whole = list(loader(folder).steps(0, 5))
    rest = list(loader(folder).steps(3, 5))
    assert len(whole) == 5 and len(rest) == 2 and loader(folder).epochs(5) == 2.5
    for ones, others in zip(whole[3:], rest, strict=True):
        assert len(ones) == len(others) == 2
        for one, other in zip(ones, others, strict=True):
            assert one.ids == other.ids and torch.equal(one.sequence.ids, other.sequence.ids)
            assert (one.pixel_values is None) == (other.pixel_values is None)
            if one.pixel_values is not None and other.pixel_values is not None:
                np.testing.assert_array_equal(one.pixel_values, other.pixel_values)


def test_ranks_share_a_step_and_have_equally_many_micro_batches(folder: Path) -> None:
    alone = next(loader(folder).steps(0, 1))
    ranks = [next(loader(folder, rank=rank, world=2).steps(0, 1)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    for one, first, second in zip(alone, *ranks, strict=True):
        assert one.ids == first.ids + second.ids


def test_workers_give_the_same_batches_and_pass_errors_on_in_one_line(folder: Path) -> None:
    alone = [[batch.ids for batch in batches] for batches in loader(folder).steps(0, 3)]
    assert [[batch.ids for batch in batches] for batches in loader(folder, num_workers=1).steps(0, 3)] == alone
    (folder / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png is missing") as caught:
        list(loader(folder, num_workers=1).steps(0, 2))
    assert "Traceback" not in str(caught.value)
