"""Image files to pictures and pixel tensors; docs/images.md says what is done with which kind of file."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.errors import UserError

LONGEST_PADDED = 1 << 14
"""Pixels: a square of this side is the most that an image may become on its way to the encoder's size."""

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

WHITE_IS_ZERO, PHOTOMETRIC, BITS = 0, 262, 258
"""A value of TIFF's tag PhotometricInterpretation, that tag, and BitsPerSample."""


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
    if isinstance(error, FileNotFoundError):
        return UserError(f"{who}image {path} is missing; correct the path or the split's `images`")
    if isinstance(error, UnidentifiedImageError):
        why = "not an image of a format that Pillow knows" if path.stat().st_size else "the file is empty"
    elif isinstance(error, OSError) and error.strerror:
        why = error.strerror
    else:
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return UserError(f"{who}image {path} cannot be read ({why}); replace it or leave it out")


def status_of(path: Path) -> os.stat_result:
    """Size and times of a file; OSError for what is none: a pipe or a device would keep its reader waiting."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    return status


def read_image(path: str | Path, asked_by: str = "", orientation: bool = True) -> Image.Image:
    """The picture in a file, RGB: the first where there are several, the way a viewer shows it.

    Args:
        asked_by: who wants it (a sample, a question, a key), for errors.
        orientation: turn it as its EXIF orientation says.
    Raises:
        UserError: the file is missing, broken, no image, or its values say no brightness.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's do not name the file; what matters ends in an error
            status_of(path)
            with Image.open(path) as file:
                file.load()
                if 0 in file.size:
                    raise ValueError(f"it has {file.width} x {file.height} pixels")
                image = to_rgb(file)
                turn = UPRIGHT.get(_orientation(file)) if orientation else None
                return image if turn is None else image.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything for a broken file
        raise unreadable(path, asked_by, error) from None


def _orientation(file: Image.Image) -> int:
    """1 to 8; 1, as stored, where there is none or the EXIF data is broken."""
    try:
        return int(file.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # the pixels are whole
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB: more than 8 bits scaled down to 8, what is transparent on white.

    Raises:
        ValueError: values that are no numbers; a mode that Pillow cannot convert.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, unlike what Pillow reads
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    rgba = (image.convert("L") if image.mode == "1" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """One channel of 16 or 32 bits as 8 bits."""
    values = np.asarray(image).astype(np.float64)  # [H, W]
    if not np.isfinite(values).all():
        raise ValueError("it has values that are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    white = _white(image, low, high)
    black, white = (low, high) if white is None else (0.0, white)
    grey = (values - black) * (255 / (white - black)) if white > black else np.zeros_like(values)
    tags = getattr(image, "tag_v2", {})
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def _white(image: Image.Image, low: float, high: float) -> float | None:
    """The value that is white; None: the image's own largest one, its smallest being black.

    A format of 16 bits says so itself. Other numbers come without a unit: those of 0..1 (floats), of 8 and of 16 bits
    are told by the largest, unless it is so small that the picture would be all but black.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
        return float((1 << bits) - 1)
    if image.mode == "I" and image.format == "PPM":
        return 65535.0
    if low < 0:
        return None
    smallest = 1.0 if image.mode == "F" else 255.0
    if high <= smallest:
        return smallest
    return next((white for white in (255.0, 65535.0) if white / 4 <= high <= white), None)


class ImageReader:
    """Reads images for an image processor, or raises a UserError that names who asks: never another image instead."""

    def __init__(self, processor: Callable[..., dict[str, Tensor]]) -> None:
        self.processor = processor

    def open(self, path: Path, asked_by: str = "") -> Image.Image:
        """The picture, RGB, as the processor is to get it: `read_image`, by the processor's own `exif_orientation`."""
        image = read_image(path, asked_by, getattr(self.processor, "exif_orientation", True))
        if prepared_pixels(self.processor, *image.size) > LONGEST_PADDED**2:
            raise unreadable(path, asked_by, ValueError(f"{image.width} x {image.height} pixels are too long a strip"))
        return image

    def __call__(self, path: Path, asked_by: str = "") -> Tensor:
        """[3, H, W] float32."""
        pixels: Tensor = self.processor(self.open(path, asked_by), return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)


def prepared_pixels(processor: Any, width: int, height: int) -> float:
    """How many pixels a processor makes of an image before it cuts or shrinks it to the encoder's size."""
    long, short = max(width, height), min(width, height)
    if getattr(processor, "do_pad", False):
        return long**2
    edge = (getattr(processor, "size", None) or {}).get("shortest_edge")
    return edge**2 * long / short if edge else 0
