"""Image files to pictures and pixel tensors; docs/images.md says what is done with which kind of file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.fitting import check_size, fit
from mmprune_train.data.image_folder import ImageFolder
from mmprune_train.data.rgb import to_rgb
from mmprune_train.errors import UserError
from mmprune_train.storage.user_files import file_status, reason_of, short

FORMATS = {
    "PNG": 8, "JPEG": 8, "WEBP": 18, "GIF": 8, "TIFF": 14, "BMP": 8, "PPM": 8, "JPEG2000": 28, "AVIF": 22,
}  # fmt: skip
"""What is read, by Pillow's names, and the most bytes a pixel that decoding and converting hold at a time. Of Pillow's
other formats some start programs (EPS), and none is common in data sets."""
PROGRESSIVE = 4
"""More bytes a pixel of a progressive JPEG, all of whose coefficients are held."""
MOST_MEMORY = 960 << 20
"""Bytes that reading an image may take: with what is the same for all images, 1 GiB."""
MOST_BYTES = 1 << 29
"""Of an image file."""
TILE_SIDES = (322, 323)
"""TIFF's tags TileWidth and TileLength."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes an image stored so upright."""


def image_processor(encoder: EncoderConfig, aspect_ratio: str, exif_orientation: bool = True) -> LlavaImageProcessorPil:
    """LLaVA's image processor for this encoder.

    `square`: the short side becomes `image_size` and the middle is cut out, as CLIP does. `pad`: first padded to a
    square with the mean colour, int(mean x 255). PIL based, so torchvision is not needed. `exif_orientation` is saved
    with it, for whoever reads images for this model later.
    """
    if aspect_ratio not in ("square", "pad"):
        raise UserError(f"image_aspect_ratio={aspect_ratio!r}: choose square or pad")
    side = encoder.image_size
    return LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=aspect_ratio == "pad",
        image_mean=list(encoder.image_mean),
        image_std=list(encoder.image_std),
        exif_orientation=exif_orientation,
    )


def unreadable(path: Path, asked_by: str, error: Exception) -> UserError:
    """What to tell of an image that `error` kept from being read."""
    who = f"{asked_by}: " if asked_by else ""
    told = short(str(path), 500)
    if isinstance(error, FileNotFoundError):
        return UserError(f"{who}image {told} is missing; correct the path or the split's `images`")
    if isinstance(error, UnidentifiedImageError):
        why = f"no image of a format that is read: {', '.join(FORMATS)}" if path.stat().st_size else "the file is empty"
    else:
        why = reason_of(error)
    return UserError(f"{who}image {told} cannot be read ({why}); replace it or leave it out")


def read_image(
    path: str | Path,
    asked_by: str = "",
    orientation: bool = True,
    check: Callable[[int, int], None] | None = None,
    content: bytes | None = None,
) -> Image.Image:
    """The picture in a file, RGB: the first where there are several, the way a viewer shows it.

    Args:
        asked_by: who wants it (a sample, a question, a key), for errors.
        orientation: turn it as its EXIF orientation says.
        check: raises ValueError for a width and height, as stored, that are not wanted.
        content: the image file's bytes, where `path` is a larger file that holds them.
    Raises:
        UserError: the file is missing, broken, too large, no image, or its values say no brightness.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's do not name the file; what matters ends in an error
            size = file_status(path).st_size if content is None else len(content)
            if size > MOST_BYTES:
                raise ValueError(f"the file has {size:,} bytes, at most {MOST_BYTES:,} are read")
            with Image.open(path if content is None else BytesIO(content), formats=list(FORMATS)) as file:
                _check_memory(file, size)
                if check is not None:
                    check(*file.size)
                file.load()
                image = to_rgb(file)
                turn = UPRIGHT.get(_orientation(file)) if orientation else None
                if image is not file:
                    file.close()  # its pixels, too
                if turn is not None:
                    return image.transpose(turn)
                return image.copy() if image is file else image
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything for a broken file
        raise unreadable(path, asked_by, error) from None


def _check_memory(file: Image.Image, size: int) -> None:
    """Raise ValueError for pixels that are none, or too many to be made; `size` of the file in bytes."""
    width, height = file.size
    if not (width and height):
        raise ValueError(f"it has {width} x {height} pixels")
    kind = "JPEG" if file.format == "MPO" else str(file.format)
    each = FORMATS[kind] + (PROGRESSIVE if "progressive" in file.info else 0)
    tags = getattr(file, "tag_v2", {})
    pixels = max(width * height, math.prod(tags.get(side, 0) for side in TILE_SIDES))
    needs = pixels * each + (size if each > FORMATS["PNG"] else 0)  # others hold the file, too
    if needs > MOST_MEMORY:
        raise ValueError(
            f"{width} x {height} pixels of {kind} take {needs >> 20:,} MiB to read, at most {MOST_MEMORY >> 20} may: "
            "make it smaller"
        )


def _orientation(file: Image.Image) -> int:
    """1 to 8; 1, as stored, where there is none or the EXIF data is broken."""
    try:
        return int(file.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # the pixels are whole
        return 1


@dataclass
class ImageReader:
    """Reads images for an image processor, or raises a UserError that names who asks: never another image instead."""

    processor: Callable[..., dict[str, Tensor]]
    folder: ImageFolder | None = None
    """That images must lie in, links followed; None: anywhere."""

    def open(self, path: Path, asked_by: str = "", content: bytes | None = None) -> Image.Image:
        """The picture, RGB, as the processor is to get it: upright where its own `exif_orientation` says so, and at the
        size that it would be given. `content` as in `read_image`."""
        if self.folder is not None:
            self.folder.check(path, asked_by)
        upright = getattr(self.processor, "exif_orientation", True)
        image = read_image(path, asked_by, upright, partial(check_size, self.processor), content)
        return fit(self.processor, image)

    def __call__(self, path: Path, asked_by: str = "") -> Tensor:
        """[3, H, W] float32."""
        pixels: Tensor = self.processor(self.open(path, asked_by), return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)
