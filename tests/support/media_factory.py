"""Synthetic clips and images, and encoders without weights, for the data tests."""

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hunyuan_train.encoders.text import TextFeatures

SAMPLE_MEDIA = Path(__file__).resolve().parents[3] / "shared" / "media"


def grey(index: int) -> int:
    """Grey level that marks frame ``index``; steps of 4 survive the conversion to YUV and back."""
    return 16 + 4 * index


def marked_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames of one grey level each, so that a decoded pixel tells which frame it is from."""
    return [np.full((height, width, 3), grey(index), np.uint8) for index in range(count)]


def frame_numbers(pixels: np.ndarray) -> list[int]:
    """Undo :func:`grey` on decoded clips [F, H, W, 3]."""
    return [round((float(frame.mean()) - 16) / 4) for frame in pixels]


def write_video(
    path: Path,
    frames: list[np.ndarray],
    *,
    fps: int = 24,
    times: list[float] | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    faststart: bool = False,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
) -> Path:
    """Write a clip; ``times`` in seconds make the frame rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=flags) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        stream.options = options if options is not None else {"qp": "0", "preset": "ultrafast"}
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (times[index] if times else index / fps))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_image(path: Path, height: int = 48, width: int = 64, level: int = 128) -> Path:
    """Write one plain image; the suffix chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(path)
    return path


def box_offset(path: Path, kind: bytes) -> int:
    """Return the byte offset of a top-level MP4 box."""
    data, offset = path.read_bytes(), 0
    while offset + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[offset : offset + 8])
        if name == kind:
            return offset
        offset += length
    raise AssertionError(f"{path} has no {kind!r} box")


@dataclass
class FakePosterior:
    mean: Tensor
    std: Tensor


class FakeVae(nn.Module):
    """Averages 8x8 pixel blocks of every fourth frame into 4 channels; counts what it encodes."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([gain]))
        self.clips = 0
        self.calls = 0

    def encode(self, pixels: Tensor) -> FakePosterior:
        self.calls += 1
        self.clips += pixels.shape[0]
        blocks = torch.nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 8, 8))
        mean = torch.cat([blocks, blocks.mean(1, keepdim=True)], 1) * self.gain
        return FakePosterior(mean, torch.full_like(mean, 0.25))


class FakeText:
    """One token per word, the number of its letters; counts what it encodes."""

    sees_images = False
    text_length = 6
    text_dim = 3
    pooled_dim = 2

    def __init__(self, fingerprint: str = "fake-text-1") -> None:
        self.fingerprint = fingerprint
        self.captions: list[str] = []

    def encode(self, captions: list[str], media: str) -> TextFeatures:
        self.captions += captions
        states = torch.zeros(len(captions), self.text_length, self.text_dim)
        mask = torch.zeros(len(captions), self.text_length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            words = (caption.split() or ["<empty>"])[: self.text_length]
            if caption == "?":
                words = []
            for column, word in enumerate(words):
                states[row, column] = len(word)
                mask[row, column] = True
        level = 1.0 if media == "image" else 2.0
        pooled = torch.full((len(captions), self.pooled_dim), level)
        return TextFeatures(states=states, mask=mask, pooled=pooled)
