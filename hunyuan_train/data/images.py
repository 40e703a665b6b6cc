"""Image decoding: any mode to upright 8-bit RGB, damage reported with its cause."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hunyuan_train.data.buckets import Bucket, CoverCrop
from hunyuan_train.data.quarantine import MediaError, Reason
from hunyuan_train.data.sniff import Family, check_complete, sniff

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow's decoders raise on bad bytes (a broken PNG chunk is a SyntaxError)."""


def read_image(path: Path) -> Image.Image:
    """Read one image as upright RGB.

    The EXIF orientation is applied; transparency is composited on white, the page that most
    transparent pictures are drawn for; 16-bit grey keeps its high byte; of an animation the first
    frame is used.

    Raises:
        MediaError: The file is empty, not an image, truncated, damaged or implausibly large.
    """
    if path.stat().st_size == 0:
        raise MediaError(Reason.empty, "the file is empty (0 bytes)")
    content = sniff(path)
    if content.family in (Family.video, Family.audio, Family.text, Family.other):
        raise MediaError(Reason.mislabelled, f"{content.name} named {path.suffix}, not an image")
    check_complete(path)
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise MediaError(
            Reason.unrecognised, "the header is garbage: no image format has these first bytes"
        ) from error
    except Image.DecompressionBombError as error:
        raise MediaError(Reason.too_large, str(error)) from error
    except _DECODE_ERRORS as error:
        cause = str(error)
        if "truncated" in cause.lower():
            raise MediaError(
                Reason.truncated, f"{content.name} that ends too early: {cause}"
            ) from error
        raise MediaError(Reason.damaged, f"{content.name} that does not decode: {cause}") from error


def image_pixels(image: Image.Image, bucket: Bucket, cover: CoverCrop) -> np.ndarray:
    """Resize (bicubic, antialiased) and crop an RGB image: uint8 [height, width, 3]."""
    resized = image.resize((cover.resize_width, cover.resize_height), Image.Resampling.BICUBIC)
    box = (cover.left, cover.top, cover.left + bucket.width, cover.top + bucket.height)
    return np.array(resized.crop(box))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        # Pillow's "I" and "F" carry 16-bit data unscaled; 8-bit data stored wide stays as it is.
        scale = 257.0 if values.max() > 255 else 1.0
        grey = np.clip(np.round(values / scale), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")
