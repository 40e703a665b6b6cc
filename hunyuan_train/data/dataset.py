"""From one source file to its bucketed pixels."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hunyuan_train.data.buckets import Assignment, Bucket, BucketTable
from hunyuan_train.data.config import ClipStart, DataConfig, Integrity
from hunyuan_train.data.decode import VideoInfo, VideoReader, frame_pixels
from hunyuan_train.data.images import image_pixels, read_image
from hunyuan_train.data.quarantine import MediaError, Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShape:
    """A bucket that a source goes to, and how it gets there."""

    bucket: Bucket
    anchor: int
    fps: float
    """Frames per second of the sample after thinning; 0 for images."""
    scale: float
    """Resize factor per side; above 1 the source was enlarged."""
    crop_loss: float
    """Share of the resized picture outside the crop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelSample(SampleShape):
    """One bucket's worth of pixels of one source."""

    pixels: np.ndarray
    """uint8 [frames, height, width, 3], upright RGB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Which of its frames a clip is cut to, where that is drawn."""

    interval: int
    """Frames from one to the next, beyond what ``data.max_fps`` leaves out; fewer where the clip is
    too short for them."""
    offset: float
    """From 0 to below 1: where in the clip the cut begins, as early to as late as it can."""


def frame_stride(fps: float, max_fps: float) -> int:
    """Return the smallest stride that brings ``fps`` below ``max_fps``."""
    return math.floor(fps / max_fps) + 1


def decode_samples(
    path: Path, media: str, cfg: DataConfig, table: BucketTable, window: Window | None = None
) -> list[PixelSample]:
    """Decode ``path`` once and return its samples, one per assigned bucket.

    Their frames begin where ``data.clip_start`` says and follow each other, or are those of
    ``window``.

    Raises:
        MediaError: The file cannot become a sample; the error says why.
    """
    if media == "image":
        image = read_image(path)
        chosen = _assign_image(image, cfg, table)
        return [
            PixelSample(
                **_described(item, 0.0), pixels=image_pixels(image, item.bucket, item.cover)[None]
            )
            for item in chosen
        ]
    with VideoReader(path) as reader:
        info = reader.info
        stride = frame_stride(info.fps, cfg.max_fps)
        chosen = _assign_video(info, cfg, table)
        centre = window is None and cfg.clip_start == ClipStart.centre
        cut = window or Window(interval=1, offset=0.0)
        frames = [
            reader.choose(
                item.bucket.frames,
                stride * widest_interval(info.frames, item.bucket.frames, stride, cut.interval),
                centre=centre,
                offset=cut.offset,
            )
            for item in chosen
        ]
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
        PixelSample(**_described(item, info.fps / stride), pixels=clip)
        for item, clip in zip(chosen, clips, strict=True)
    ]


def widest_interval(have: int, wanted: int, stride: int, most: int) -> int:
    """Return the largest interval up to ``most`` at which a clip has the wanted frames, or 1."""
    return max(1, min(most, (have - 1) // (stride * max(wanted - 1, 1))))


def probe_samples(path: Path, media: str, cfg: DataConfig, table: BucketTable) -> list[SampleShape]:
    """Return the shapes of what :func:`decode_samples` would return, decoding one frame at most.

    Raises:
        MediaError: The file cannot become a sample, as far as its first frame tells.
    """
    if media == "image":
        return [
            SampleShape(**_described(item, 0.0))
            for item in _assign_image(read_image(path), cfg, table)
        ]
    with VideoReader(path) as reader:
        info = reader.info
    fps = info.fps / frame_stride(info.fps, cfg.max_fps)
    return [SampleShape(**_described(item, fps)) for item in _assign_video(info, cfg, table)]


def check_readable(path: Path, media: str) -> None:
    """Open ``path`` and decode its first frame, to learn whether it is what its name says.

    Raises:
        MediaError: It is not.
    """
    if media == "image":
        read_image(path)
    else:
        VideoReader(path).__exit__(None, None, None)


def _assign_image(image: Image.Image, cfg: DataConfig, table: BucketTable) -> list[Assignment]:
    chosen = _assign(image.height, image.width, 1, cfg, table)
    if not chosen:
        raise _too_short("an image is 1 frame", table)
    return chosen


def _assign_video(info: VideoInfo, cfg: DataConfig, table: BucketTable) -> list[Assignment]:
    stride = frame_stride(info.fps, cfg.max_fps)
    usable = (info.frames - 1) // stride + 1
    chosen = _assign(info.height, info.width, usable, cfg, table)
    if not chosen:
        raise _too_short(f"{usable} usable frames at {info.fps / stride:g} fps", table)
    return chosen


def _assign(
    height: int, width: int, frames: int, cfg: DataConfig, table: BucketTable
) -> list[Assignment]:
    return table.assign(height, width, frames, cfg.assign, cfg.max_upscale, cfg.max_crop_loss)


def _described(item: Assignment, fps: float) -> dict[str, Any]:
    return {
        "bucket": item.bucket,
        "anchor": item.anchor,
        "fps": round(fps, 3) if item.bucket.frames > 1 else 0.0,
        "scale": round(item.cover.scale, 4),
        "crop_loss": round(item.cover.crop_loss, 4),
    }


def _too_short(have: str, table: BucketTable) -> MediaError:
    return MediaError(
        Reason.too_short,
        f"too short: {have}, and the shortest of data.durations is {table.durations[0]}",
    )
