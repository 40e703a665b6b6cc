"""Buckets: the fixed (frames, height, width) shapes that samples are resized and cropped to."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from hunyuan_train.data.quarantine import MediaError, Reason
from hunyuan_train.models.vae.config import VaeConfig

PIXEL_MULTIPLE = 16
"""LATENT_PX pixels per latent (VAE) times 2 latents per token (DiT patch)."""
LATENT_PX = 8
"""Pixels per latent position along height and along width."""
FRAME_STRIDE = 4
"""Pixel frames per latent frame after the first."""


class Assign(StrEnum):
    """How many samples one source file becomes."""

    nearest = "nearest"
    every = "every"


@dataclass(frozen=True, order=True, slots=True)
class Bucket:
    """One sample shape in pixels: (frames, height, width), written ``17x64x96``.

    Raises:
        ValueError: Height or width is not a positive multiple of 16, or frames is not 4n+1.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Reject shapes that the VAE and the patch size cannot represent."""
        check_frames(self.frames, "bucket frames")
        for name, value in (("height", self.height), ("width", self.width)):
            if value < PIXEL_MULTIPLE or value % PIXEL_MULTIPLE:
                raise ValueError(
                    f"bucket {name}={value} is not a multiple of {PIXEL_MULTIPLE}; "
                    f"use {_nearest(value, PIXEL_MULTIPLE, 0)}"
                )

    def __str__(self) -> str:
        """Return ``FRAMESxHEIGHTxWIDTH``."""
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``FRAMESxHEIGHTxWIDTH``.

        Raises:
            ValueError: The text is not three integers, or the shape is not legal.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise ValueError(
                f"bucket {text!r} is not FRAMESxHEIGHTxWIDTH; write it like 17x256x256"
            )
        return cls(*(int(part) for part in parts))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent (T, h, w) of the 4x8x8 VAE."""
        area = self.height // LATENT_PX, self.width // LATENT_PX
        return ((self.frames - 1) // FRAME_STRIDE + 1, *area)

    @property
    def tokens(self) -> int:
        """Image tokens of the DiT with patch size (1, 2, 2)."""
        frames, height, width = self.latent_shape
        return frames * (height // 2) * (width // 2)

    @property
    def media(self) -> str:
        """``image`` for one frame, else ``video``: it selects the prompt template."""
        return "image" if self.frames == 1 else "video"


@dataclass(frozen=True, slots=True)
class CoverCrop:
    """Resize to cover a bucket, then crop its centre; sizes in pixels of the upright picture."""

    resize_height: int
    resize_width: int
    top: int
    left: int
    scale: float
    """Pixels after over pixels before, per side; above 1 the source is enlarged."""
    crop_loss: float
    """Share of the resized picture that the crop throws away, 0..1."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A bucket chosen for a source, and how to get there."""

    bucket: Bucket
    anchor: int
    cover: CoverCrop


def cover_crop(height: int, width: int, bucket: Bucket) -> CoverCrop:
    """Return the smallest resize of a picture that covers ``bucket``, and the centre crop."""
    scale = max(bucket.height / height, bucket.width / width)
    resize_height = max(bucket.height, round(height * scale))
    resize_width = max(bucket.width, round(width * scale))
    return CoverCrop(
        resize_height=resize_height,
        resize_width=resize_width,
        top=(resize_height - bucket.height) // 2,
        left=(resize_width - bucket.width) // 2,
        scale=scale,
        crop_loss=1.0 - (bucket.height * bucket.width) / (resize_height * resize_width),
    )


def check_frames(frames: int, name: str) -> None:
    """Raise ValueError unless ``frames`` is 4n+1, the lengths the VAE maps to whole latents."""
    if frames < 1 or frames % FRAME_STRIDE != 1:
        raise ValueError(
            f"{name}={frames} is not 4n+1 (1, 5, 9, 13, ...); "
            f"use {_nearest(frames, FRAME_STRIDE, 1)}"
        )


def check_vae(cfg: VaeConfig) -> None:
    """Raise ValueError unless the VAE's latents have the size that buckets are counted with."""
    if cfg.spatial_ratio != LATENT_PX:
        raise ValueError(
            f"the VAE in run.vae ({cfg.kind}) makes one latent of {cfg.spatial_ratio} x "
            f"{cfg.spatial_ratio} pixels, but buckets, latent stores and the transformer count "
            f"{LATENT_PX} x {LATENT_PX}; give run.vae a vae_884"
        )


class BucketTable:
    """The shapes of a data set: every duration times, per anchor, a walk over aspect ratios.

    The sizes of an anchor are those of the generator that public HunyuanVideo code uses: with
    ``n = round((anchor / stride)^2)`` cells, walk the staircase under ``columns * rows = n`` from
    wide to tall and keep the steps whose aspect stays within ``max_aspect``. For stride 16 that is
    13 sizes at anchor 64, 19 at 96, 49 at 256.

    Args:
        anchors: Side lengths in pixels; a size of anchor ``a`` has at most about ``a * a`` pixels.
        durations: Frame counts, each 4n+1.
        max_aspect: Largest long side over short side.
        stride: Pixels per cell, a multiple of 16.

    Raises:
        ValueError: An argument is out of range; the message names it and the fix.
    """

    def __init__(
        self,
        anchors: Iterable[int] = (256,),
        durations: Iterable[int] = (1, 17),
        max_aspect: float = 4.0,
        stride: int = PIXEL_MULTIPLE,
    ) -> None:
        self.anchors = sorted(set(anchors))
        self.durations = sorted(set(durations))
        if not self.anchors or not self.durations:
            raise ValueError(
                "anchors and durations must not be empty; try anchors=[256] durations=[1]"
            )
        if stride < PIXEL_MULTIPLE or stride % PIXEL_MULTIPLE:
            raise ValueError(
                f"bucket stride={stride} is not a multiple of {PIXEL_MULTIPLE}; use 16"
            )
        if max_aspect < 1.0:
            raise ValueError(f"max_aspect={max_aspect} is below 1; use 1 for squares only, or 4")
        for frames in self.durations:
            check_frames(frames, "duration")
        self.sizes: dict[int, list[tuple[int, int]]] = {}
        for anchor in self.anchors:
            if anchor < stride:
                raise ValueError(f"anchor={anchor} is below the bucket stride {stride}; raise it")
            cells = round((anchor / stride) ** 2)
            self.sizes[anchor] = [
                (rows * stride, columns * stride) for rows, columns in _walk(cells, max_aspect)
            ]

    def buckets(self) -> list[Bucket]:
        """Return every bucket of the table, sorted and without repeats."""
        return sorted(
            {
                Bucket(frames, height, width)
                for frames in self.durations
                for sizes in self.sizes.values()
                for height, width in sizes
            }
        )

    def nearest_size(self, anchor: int, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of ``anchor`` whose aspect is nearest in log space.

        Equally near sizes are decided by the larger area, then by the smaller height, so the choice
        does not depend on the order of the table.
        """
        aspect = math.log(width / height)

        def rank(size: tuple[int, int]) -> tuple[float, int, int]:
            distance = abs(math.log(size[1] / size[0]) - aspect)
            return (round(distance, 9), -size[0] * size[1], size[0])

        return min(self.sizes[anchor], key=rank)

    def assign(
        self,
        height: int,
        width: int,
        frames: int,
        mode: Assign = Assign.nearest,
        max_upscale: float = 1.0,
        max_crop_loss: float = 1.0,
    ) -> list[Assignment]:
        """Choose the buckets of a source of ``frames`` usable frames.

        An anchor fits when covering its nearest size enlarges the source by at most
        ``max_upscale``; the smallest anchor always fits, so a small source is enlarged rather than
        lost. ``nearest`` takes the largest anchor that fits and the longest duration that fits,
        ``every`` takes all of both. Sizes whose crop removes more than ``max_crop_loss`` are not
        taken. The list is empty when the source is shorter than every duration.

        Raises:
            MediaError: Every anchor that fits crops away too much.
        """
        durations = [duration for duration in self.durations if duration <= frames]
        fitting: list[Assignment] = []
        for index, anchor in enumerate(self.anchors):
            size = self.nearest_size(anchor, height, width)
            cover = cover_crop(height, width, Bucket(1, *size))
            if index == 0 or cover.scale <= max_upscale + 1e-9:
                fitting.extend(
                    Assignment(bucket=Bucket(duration, *size), anchor=anchor, cover=cover)
                    for duration in durations
                )
        kept = [item for item in fitting if item.cover.crop_loss <= max_crop_loss + 1e-9]
        if fitting and not kept:
            raise _cropped_too_much(height, width, fitting, max_crop_loss)
        return kept[-1:] if mode == Assign.nearest else kept


def _cropped_too_much(
    height: int, width: int, fitting: list[Assignment], max_crop_loss: float
) -> MediaError:
    best = min(fitting, key=lambda item: (item.cover.crop_loss, -item.bucket.tokens))
    aspect = f"{width / height:.3g}:1" if width >= height else f"1:{height / width:.3g}"
    return MediaError(
        Reason.crop,
        f"aspect {aspect} is too far from every bucket: a crop to the nearest, {best.bucket}, "
        f"loses {best.cover.crop_loss:.1%} of the picture, and data.max_crop_loss is "
        f"{max_crop_loss:.1%}",
    )


def _walk(cells: int, max_aspect: float) -> Iterator[tuple[int, int]]:
    """Yield (rows, columns) on the staircase under ``rows * columns = cells``, wide to tall."""
    rows, columns = 1, cells
    while columns:
        if max(rows, columns) <= max_aspect * min(rows, columns):
            yield rows, columns
        if (rows + 1) * columns <= cells:
            rows += 1
        else:
            columns -= 1


def _nearest(value: int, multiple: int, offset: int) -> str:
    """Name the legal values (``offset`` modulo ``multiple``) on both sides of ``value``."""
    below = (value - offset) // multiple * multiple + offset
    above = below + multiple
    smallest = offset or multiple
    return f"{below} or {above}" if below >= smallest else f"{smallest}"
