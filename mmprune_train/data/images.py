"""Image files to pixel tensors, by the image processor that is saved with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.errors import UserError


def image_processor(encoder: EncoderConfig, aspect_ratio: str) -> LlavaImageProcessorPil:
    """LLaVA's image processor for this encoder.

    `square`: the short side becomes `image_size` and the middle is cut out, as CLIP does. `pad`: first padded to a
    square with the mean colour, int(mean x 255). PIL based, so torchvision is not needed.
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
    )


def unreadable(path: Path, sample: str, error: Exception) -> UserError:
    """What to tell of an image that `error` kept from being read; `sample` is who asks for it."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{sample}: image {path} is missing; correct the path or the split's `images`")
    return UserError(f"{sample}: image {path} cannot be read ({error}); replace it or drop the sample")


class ImageReader:
    """Path -> [3, H, W] float32, or a UserError that names the sample: never a neighbour's image in its place."""

    def __init__(self, processor: Callable[..., dict[str, Tensor]]) -> None:
        self.processor = processor

    def __call__(self, path: Path, sample: str = "") -> Tensor:
        """`sample` names the asking sample in errors. Truncated files are errors, too."""
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise unreadable(path, sample, error) from None
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)
