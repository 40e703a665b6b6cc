"""A video file to its latents and back, in memory that does not grow with its length."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.data.buckets import FRAME_STRIDE, PIXEL_MULTIPLE, Bucket, cover_crop
from hunyuan_train.data.decode import VideoReader, frame_pixels
from hunyuan_train.data.latent_file import DTYPES, LatentReader, LatentWriter
from hunyuan_train.data.quarantine import MediaError
from hunyuan_train.encoders.latents import weights_fingerprint
from hunyuan_train.evaluation.video import Mp4Writer
from hunyuan_train.memory.vae import choose_tile_batch
from hunyuan_train.models.vae.base import Vae

Progress = Callable[[int, int], None]
"""Called with (pixel frames done, pixel frames in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSummary:
    """What was encoded or decoded."""

    frames: int
    """Pixel frames."""
    height: int
    width: int
    fps: float
    """Frames per second of those frames."""
    left_out: int
    """Frames at the end of the file beyond the last 4n+1."""
    tile_batch: int
    seconds: float

    def __str__(self) -> str:
        """Return the summary as one line."""
        rest = f", {self.left_out} at the end left out" if self.left_out else ""
        return (
            f"{self.frames} frames of {self.height} x {self.width} at {self.fps:g} per second"
            f"{rest}, {self.tile_batch} tiles together, {self.seconds:.1f} s"
        )


@torch.no_grad()
def encode_clip(
    vae: Vae,
    source: Path,
    output: Path,
    *,
    size: tuple[int, int] | None = None,
    every: int = 1,
    free_bytes: int | None = None,
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
) -> ClipSummary:
    """Encode a video file of any length to a safetensors file of ``mean`` and ``std``, unscaled.

    A VAE without time tiles takes the whole clip at once.

    Args:
        vae: The VAE, on its device.
        source: The video.
        output: File to write; its header names scaling factor, frame rate and the VAE's weights.
        size: Height and width to resize and crop to; those of the video, cut to multiples of 16,
            when None.
        every: Take every so many-th frame.
        free_bytes: Memory for the tiles that run together; None runs them one by one.
        dtype: Stored number format.
        progress: Called as time tiles are done.

    Raises:
        ValueError: The file is no usable video, or a size does not fit.
    """
    started = time.monotonic()
    try:
        with VideoReader(source) as reader:
            info = reader.info
            available = (info.frames - 1) // every + 1
            count = (available - 1) // FRAME_STRIDE * FRAME_STRIDE + 1
            height, width = size or (_cut(info.height), _cut(info.width))
            bucket = Bucket(count, height, width)
            video = (count, height, width)
            batch = _use_memory(vae, video, free_bytes, decode=False)
            frames = _read_frames(reader, bucket, every)
            fps = info.fps / every
            ratio = vae.cfg.spatial_ratio
            latents = (count - 1) // vae.cfg.temporal_ratio + 1
            shape = (vae.cfg.latent_channels, latents, height // ratio, width // ratio)
            with LatentWriter(output, shape, dtype, _metadata(vae, source, fps)) as writer:
                for posterior in _posteriors(vae, frames):
                    writer.add(posterior.mean[0], posterior.std[0])
                    if progress is not None:
                        progress((writer.frames - 1) * vae.cfg.temporal_ratio + 1, count)
    except MediaError as error:
        raise ValueError(f"{source}: {error}") from error
    return ClipSummary(
        frames=count,
        height=height,
        width=width,
        fps=fps,
        left_out=available - count,
        tile_batch=batch,
        seconds=time.monotonic() - started,
    )


@torch.no_grad()
def decode_clip(
    vae: Vae,
    source: Path,
    output: Path,
    *,
    free_bytes: int | None = None,
    progress: Progress | None = None,
) -> ClipSummary:
    """Decode a file of ``encode_clip`` to an mp4 of the same frame rate.

    Args:
        vae: The VAE, on its device.
        source: The latents.
        output: The mp4.
        free_bytes: Memory for the tiles that run together; None runs them one by one.
        progress: Called as time tiles are done.

    Raises:
        ValueError: The file holds no latents of a clip, or of another VAE.
    """
    started = time.monotonic()
    reader = LatentReader(source)
    channels, latents, *area = reader.shape
    if channels != vae.cfg.latent_channels:
        raise ValueError(
            f"{source} has {channels} channels, but the VAE decodes {vae.cfg.latent_channels}; "
            "give the VAE that encoded it"
        )
    count = (latents - 1) * vae.cfg.temporal_ratio + 1
    height, width = (side * vae.cfg.spatial_ratio for side in area)
    batch = _use_memory(vae, (count, height, width), free_bytes, decode=True)
    fps = float(reader.metadata.get("fps", 24.0))
    with Mp4Writer(output, Fraction(fps).limit_denominator(1001)) as writer:
        for pixels in _pixels(vae, reader):
            writer.add(pixels[0])
            if progress is not None:
                progress(writer.frames, count)
    return ClipSummary(
        frames=count,
        height=height,
        width=width,
        fps=fps,
        left_out=0,
        tile_batch=batch,
        seconds=time.monotonic() - started,
    )


def latent_dtype(name: str) -> torch.dtype:
    """Return the stored number format of a name.

    Raises:
        ValueError: it is none.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
    if name not in names:
        raise ValueError(f"dtype={name} cannot be stored; choose from {' '.join(names)}")
    return getattr(torch, name)


def _use_memory(
    vae: Vae, video: tuple[int, int, int], free_bytes: int | None, *, decode: bool
) -> int:
    """Let as many tiles run together as fit and return how many."""
    batch, dtype = 1, next(vae.parameters()).dtype
    if free_bytes is not None:
        batch = choose_tile_batch(vae.cfg, video, free_bytes, decode=decode, dtype=dtype)
    vae.work = replace(vae.work, batch=batch)
    return batch


def _read_frames(reader: VideoReader, bucket: Bucket, every: int) -> Iterator[Tensor]:
    """Yield the frames of a file, [1, 3, 1, H, W] bytes; a slow stretch repeats some."""
    info = reader.info
    cover = cover_crop(info.height, info.width, bucket)
    chosen = reader.choose(bucket.frames, every, centre=False)
    times = dict.fromkeys(chosen, 0)
    for index in chosen:
        times[index] += 1
    for index, frame in reader.read(chosen, check_rest=False):
        pixels = torch.from_numpy(frame_pixels(frame, info.rotation, bucket, cover))
        piece = pixels.permute(2, 0, 1)[None, :, None]
        for _ in range(times[index]):
            yield piece


def _posteriors(vae: Vae, frames: Iterator[Tensor]) -> Iterator:
    if vae.cfg.tile_temporal:
        return vae.encode_stream(frames)
    parameter = next(vae.parameters())
    pixels = torch.cat(list(frames), dim=2).to(parameter.device).float().div_(127.5).sub_(1.0)
    return iter([vae.encode(pixels.to(parameter.dtype))])


def _pixels(vae: Vae, reader: LatentReader) -> Iterator[Tensor]:
    step = vae.cfg.tile_stride_frames // vae.cfg.temporal_ratio
    if vae.cfg.tile_temporal:
        return vae.decode_stream(piece[None] for piece in reader.means(step))
    parameter = next(vae.parameters())
    whole = next(reader.means(reader.shape[1]))[None]
    return iter([vae.decode(whole.to(parameter.device, parameter.dtype))])


def _metadata(vae: Vae, source: Path, fps: float) -> dict[str, str]:
    return {
        "format": "pt",
        "kind": vae.cfg.kind,
        "scaling_factor": str(vae.cfg.scaling_factor),
        "fps": f"{fps:g}",
        "source": source.name,
        "vae": weights_fingerprint(vae.state_dict(), str(vae.cfg)),
    }


def _cut(size: int) -> int:
    return max(PIXEL_MULTIPLE, size // PIXEL_MULTIPLE * PIXEL_MULTIPLE)
