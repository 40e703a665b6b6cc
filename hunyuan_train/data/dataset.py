"""From one source file to its bucketed pixels."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hunyuan_train.data.buckets import Assignment, Bucket, BucketTable
from hunyuan_train.data.config import ClipStart, DataConfig, Integrity
from hunyuan_train.data.decode import VideoReader, frame_pixels
from hunyuan_train.data.images import image_pixels, read_image
from hunyuan_train.data.quarantine import MediaError, Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelSample:
    """One bucket's worth of pixels of one source."""

    bucket: Bucket
    anchor: int
    pixels: np.ndarray
    """uint8 [frames, height, width, 3], upright RGB."""
    fps: float
    """Frames per second of the sample after thinning; 0 for images."""
    scale: float
    """Resize factor per side; above 1 the source was enlarged."""
    crop_loss: float
    """Share of the resized picture outside the crop."""


def frame_stride(fps: float, max_fps: float) -> int:
    """Return the smallest stride that brings ``fps`` below ``max_fps``."""
    return math.floor(fps / max_fps) + 1


def decode_samples(
    path: Path, media: str, cfg: DataConfig, table: BucketTable
) -> list[PixelSample]:
    """Decode ``path`` once and return its samples, one per assigned bucket.

    Raises:
        MediaError: The file cannot become a sample; the error says why.
    """
    if media == "image":
        return _image_samples(path, cfg, table)
    with VideoReader(path) as reader:
        info = reader.info
        stride = frame_stride(info.fps, cfg.max_fps)
        usable = (info.frames - 1) // stride + 1
        chosen = table.assign(info.height, info.width, usable, cfg.assign, cfg.max_upscale)
        if not chosen:
            raise _too_short(f"{usable} usable frames at {info.fps / stride:g} fps", table)
        centre = cfg.clip_start == ClipStart.centre
        frames = [reader.choose(item.bucket.frames, stride, centre=centre) for item in chosen]
        clips = [
            np.empty((item.bucket.frames, item.bucket.height, item.bucket.width, 3), np.uint8)
            for item in chosen
        ]
        wanted = {index for indices in frames for index in indices}
        for index, frame in reader.read(wanted, check_rest=cfg.integrity == Integrity.full):
            for item, indices, clip in zip(chosen, frames, clips, strict=True):
                places = [place for place, value in enumerate(indices) if value == index]
                if places:
                    clip[places] = frame_pixels(frame, info.rotation, item.bucket, item.cover)
    return [
        _sample(item, clip, info.fps / stride if item.bucket.frames > 1 else 0.0)
        for item, clip in zip(chosen, clips, strict=True)
    ]


def check_readable(path: Path, media: str) -> None:
    """Open ``path`` and decode its first frame, to learn whether it is what its name says.

    Raises:
        MediaError: It is not.
    """
    if media == "image":
        read_image(path)
    else:
        VideoReader(path).__exit__(None, None, None)


def _image_samples(path: Path, cfg: DataConfig, table: BucketTable) -> list[PixelSample]:
    image = read_image(path)
    chosen = table.assign(image.height, image.width, 1, cfg.assign, cfg.max_upscale)
    if not chosen:
        raise _too_short("an image is 1 frame", table)
    return [
        _sample(item, image_pixels(image, item.bucket, item.cover)[None], 0.0) for item in chosen
    ]


def _sample(item: Assignment, pixels: np.ndarray, fps: float) -> PixelSample:
    return PixelSample(
        bucket=item.bucket,
        anchor=item.anchor,
        pixels=pixels,
        fps=round(fps, 3),
        scale=round(item.cover.scale, 4),
        crop_loss=round(item.cover.crop_loss, 4),
    )


def _too_short(have: str, table: BucketTable) -> MediaError:
    return MediaError(
        Reason.too_short,
        f"too short: {have}, and the shortest of data.durations is {table.durations[0]}",
    )
