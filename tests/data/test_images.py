"""Every kind of image file is seen as a viewer shows it, or is refused by name."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from data.pictures import chunk, pixels, png
from PIL import Image, ImageFile, ImageOps

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.images import UPRIGHT, ImageReader, image_processor, read_image
from mmprune_train.errors import UserError
from mmprune_train.evaluation.generate import load_images
from mmprune_train.evaluation.questions import Question
from mmprune_train.features.content import image_digests
from mmprune_train.workers import Ranks

SIDE = 32
RAMP = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))
GREY = np.round(RAMP * 255).astype(np.uint8)
WORDS = np.round(RAMP * 65535).astype(np.uint16)
ENCODER = EncoderConfig(name="t", image_size=16, patch_size=8)


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png"])
def test_of_several_pictures_the_first_is_read(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(tmp_path / f"x.{ending}") - (255, 0, 0)).max() <= 4


# -- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
def test_a_photo_is_turned_as_its_exif_orientation_says(orientation: int, ending: str, tmp_path: Path) -> None:
    stored = Image.new("RGB", (32, 16))
    stored.paste("red", (0, 0, 16, 8))
    stored.paste("lime", (16, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    stored.save(path, exif=exif, **({} if ending in ("png", "tif") else {"quality": 95}))
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file).convert("RGB")).astype(float)
    seen = pixels(path)
    assert seen.shape == ((32, 16, 3) if orientation >= 5 else (16, 32, 3))
    assert np.abs(seen - upright).max() == 0
    if ending != "tif":  # Pillow turns these on its own
        assert np.abs(pixels(path, orientation=False) - np.asarray(stored)).mean() < 12


def test_exif_data_that_is_broken_or_out_of_range_turns_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    for name, data in {"nine": exif.tobytes(), "broken": b"Exif\0\0MM\0*\xff\xff\xff", "none": b"Exif\0\0??"}.items():
        Image.new("RGB", (8, 4), "red").save(tmp_path / f"{name}.jpg", exif=data)
        assert read_image(tmp_path / f"{name}.jpg").size == (8, 4)


def test_the_processor_says_whether_orientation_counts_for_training_and_for_answers_alike(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(tmp_path / "x.jpg", exif=exif)
    question = Question("q", [tmp_path / "x.jpg"], "", "", "open")
    for upright in (True, False):
        image_processor(ENCODER, "pad", upright).save_pretrained(tmp_path / "saved")
        reader = ImageReader(type(image_processor(ENCODER, "pad")).from_pretrained(tmp_path / "saved"))
        for image in (reader.open(tmp_path / "x.jpg"), *load_images(question, reader.open)):
            assert bool((np.asarray(image)[:, 0, 0] < 200).all()) == upright  # the mean colour, where it is narrow
        blank = reader(tmp_path / "x.jpg")[0, :, 0] < 0.1
        assert bool(blank.all()) == upright
    assert load_images(question)[0].size == (4, 8)


# -- what cannot be read ---------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for ending in ("png", "jpg", "gif", "webp", "tif", "bmp", "jp2", "avif", "ppm"):
        noise.save(folder / f"cut.{ending}")
        whole = (folder / f"cut.{ending}").read_bytes()
        (folder / f"cut.{ending}").write_bytes(whole[: len(whole) // 2])
    noise.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (2 << 20)))
    (folder / "text_chunk.png").write_bytes(whole[:33] + text + whole[33:])
    noise.save(folder / "zeroed.avif")
    data = bytearray((folder / "zeroed.avif").read_bytes())
    place = data.find(b"mdat") + 4
    data[place : place + 64] = bytes(64)
    (folder / "zeroed.avif").write_bytes(data)
    (folder / "words.ppm").write_bytes(b"P6\n64 sixty 255\n" + bytes(64))
    (folder / "flat.pgm").write_bytes(b"P5\n0 4\n255\n")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    png(folder / "huge.png", np.zeros((1, 1), np.uint8), 0, side=20000)
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    names = [path.name for path in folder.iterdir() if path.name != "whole.png"]
    return {name: folder / name for name in names} | {"zero byte": folder / "a\0.png", "long": folder / ("a" * 300)}


def test_whatever_cannot_be_read_is_one_line_that_names_file_and_asker(tmp_path: Path) -> None:
    for name, path in broken_files(tmp_path).items():
        with pytest.raises(UserError) as caught, warnings.catch_warnings():
            warnings.simplefilter("error")
            read_image(path, "a.json[3] (id x)")
        told = str(caught.value)
        assert told.startswith(f"a.json[3] (id x): image {path} cannot be read ("), name
        assert "\n" not in told and "read ()" not in told and "replace it or leave it out" in told, name


@pytest.mark.parametrize("error", [RuntimeError(""), KeyError("x"), zlib.error("bad"), struct.error("s"), EOFError()])
def test_any_error_of_a_decoder_is_told(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(UserError, match=r"image .*x\.png cannot be read \(\S+"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_file_is_not_told_as_one(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(error):
        read_image(tmp_path / "x.png")


def test_a_missing_image_of_a_question_names_the_question_or_its_sample(tmp_path: Path) -> None:
    for where, who in (("", "question 7"), ("e.json[0] (id 7)", r"e\.json\[0\] \(id 7\)")):
        with pytest.raises(UserError, match=f"^{who}: image .*none.png is missing; correct the path"):
            load_images(Question("7", [tmp_path / "none.png"], "", "", "open", where=where))


def test_a_large_photo_is_read_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 40), "red").save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "x.png").size == (30, 40)


# -- programs and inputs without end ---------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 8 [8 0 0 8 0 0] {<00>} image\n%%EOF\n"
FLI = struct.pack("<IHHHHHHI", 256, 0xAF12, 1, 8, 8, 8, 3, 70) + bytes(108)


@pytest.mark.parametrize("name", ["x.eps", "x.png"])
@pytest.mark.parametrize(
    "content", [EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS, FLI]
)
def test_only_pictures_are_opened_and_no_program_is_run(
    content: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read \(no image of a format that is read: PNG, JPEG"):
        read_image(tmp_path / name, "s")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "/dev/stdin", "link to /dev/zero"])
def test_what_has_no_end_is_not_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if what == "pipe":
        os.mkfifo(path)
    elif what.startswith("link"):
        path.symlink_to(what.split()[-1])
    path = Path(what) if what.startswith("/") else path
    if what == "/dev/stdin" and path.is_file():
        pytest.skip("standard input is a file")
    with pytest.raises(UserError, match=r"s: image .* cannot be read \((a pipe|a device), not a file\)"):
        read_image(path, "s")
    with pytest.raises(UserError, match=r"s: image .* cannot be read \((a pipe|a device), not a file\)"):
        image_digests({path: "s"}, tmp_path, Ranks())


def headers(folder: Path, side: int) -> list[Path]:
    """Small files whose headers say that they hold side x side pixels."""
    Image.new("RGB", (8, 8)).save(folder / "x.jpg")
    jpeg = bytearray((folder / "x.jpg").read_bytes())
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", side, side)
    (folder / "x.jpg").write_bytes(jpeg)
    Image.new("P", (8, 8)).save(folder / "x.gif")
    gif = (folder / "x.gif").read_bytes()
    (folder / "x.gif").write_bytes(gif[:6] + struct.pack("<HH", side, side) + gif[10:])
    (folder / "x.bmp").write_bytes(b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, side, side, 1, 24, *[0] * 6))
    (folder / "x.ppm").write_bytes(b"P6 %d %d 255\n" % (side, side))
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (folder / "x.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4))
    png(folder / "x.png", np.zeros((1, 1), np.uint8), 0, side=side)
    return sorted(folder.glob("x.*"))


@pytest.mark.parametrize("side", [12_000, 50_000])
def test_too_many_pixels_are_told_from_the_header(side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("pixels are made")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    files = headers(tmp_path, side)
    assert len(files) == 6
    for path in files:
        with pytest.raises(UserError, match=r"s: image .*cannot be read \(.*(at most 960 may: make it smaller|bomb)"):
            ImageReader(image_processor(ENCODER, "square"))(path, "s")


def test_a_huge_file_is_not_read_at_all(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"the file has 1,099,511,627,776 bytes, at most"):
        read_image(tmp_path / "x.png", "s")


# -- strips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["square", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 40), (40, 1), (3, 50), (50, 3), (1, 1000)])
def test_tiny_and_narrow_images_keep_their_colour(ratio: str, size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    seen = ImageReader(image_processor(ENCODER, ratio))(tmp_path / "x.png", "s")
    assert seen.shape == (3, 16, 16) and seen.isfinite().all()
    if ratio == "square" or max(size) <= 50 * min(size):  # else padding takes all but a part of a row
        red, green, _ = seen.amax((1, 2))
        assert red > green


@pytest.mark.parametrize(("ratio", "size"), [("square", (17, 2400000)), ("pad", (40000, 2)), ("pad", (2, 40000))])
def test_a_strip_that_would_fill_the_memory_is_refused(ratio: str, size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("1", size).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=f"s: image .*{size[0]} x {size[1]} pixels are too long a strip"):
        ImageReader(image_processor(ENCODER, ratio))(tmp_path / "x.png", "s")
