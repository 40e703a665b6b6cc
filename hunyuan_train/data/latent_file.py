"""A clip's latents as a safetensors file that is written and read piece by piece.

``mean`` and ``std`` are [C, T, h, w]. Pieces along T go to their places in the file, so neither the
writer nor the reader ever holds the whole clip.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

NAMES = ("mean", "std")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
Shape = tuple[int, int, int, int]


class LatentWriter:
    """Writes a latent file; it appears under its name when the last frame is written.

    Args:
        path: The file; its folder is created.
        shape: (C, T, h, w) of the whole clip.
        dtype: Stored number format.
        metadata: Texts for the header.
    """

    def __init__(
        self, path: Path, shape: Shape, dtype: torch.dtype, metadata: Mapping[str, str]
    ) -> None:
        self._path, self._shape, self._dtype = path, shape, dtype
        channels, frames, height, width = shape
        size = channels * frames * height * width * dtype.itemsize
        code = next(code for code, known in DTYPES.items() if known == dtype)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for place, name in enumerate(NAMES):
            offsets = [place * size, (place + 1) * size]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._size = 8 + len(text), size
        self._partial = path.with_name(path.name + ".partial")
        self.frames = 0
        """Latent frames written so far."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Write the next frames, each [C, n, h, w]."""
        frames, at = mean.shape[1], self.frames
        assert at + frames <= self._shape[1], "more frames than promised"
        for place, value in enumerate((mean, std)):
            rows = value.detach().to("cpu", self._dtype).flatten(2).contiguous()
            for channel, row in enumerate(rows):
                self._file.seek(self._start + place * self._size + self._offset(channel, at))
                self._file.write(row.reshape(-1).view(torch.uint8).numpy().data)
        self.frames += frames

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it if something failed."""
        self._file.close()
        if error is not None:
            self._partial.unlink()
            return
        assert self.frames == self._shape[1], "fewer frames than promised"
        self._partial.replace(self._path)

    def _offset(self, channel: int, frame: int) -> int:
        _, frames, height, width = self._shape
        return (channel * frames + frame) * height * width * self._dtype.itemsize


class LatentReader:
    """Reads the means of a latent file.

    Raises:
        ValueError: The file is missing, or is not one of ``LatentWriter``.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} does not exist; make it with `hunyuan-train encode`")
        self._path = path
        with path.open("rb") as file:
            self._start, header = _read_header(file, path)
        self.metadata: dict[str, str] = header.get("__metadata__", {})
        found = header.get("mean", {})
        shape = found.get("shape", [])
        if len(shape) != 4 or found.get("dtype") not in DTYPES:
            raise ValueError(
                f"{path} holds no latents of a clip (a tensor `mean` of [C, T, h, w]); make it "
                "with `hunyuan-train encode`"
            )
        self.shape: Shape = (shape[0], shape[1], shape[2], shape[3])
        self._dtype = DTYPES[found["dtype"]]
        self._start += found["data_offsets"][0]
        if path.stat().st_size < self._start + self._area * shape[0] * shape[1]:
            raise ValueError(f"{path} is cut short; copy or make it again")

    def means(self, frames: int) -> Iterator[Tensor]:
        """Yield [C, up to ``frames``, h, w], one after the other."""
        channels, total, height, width = self.shape
        with self._path.open("rb") as file:
            for first in range(0, total, frames):
                count = min(frames, total - first)
                rows: list[Tensor] = []
                for channel in range(channels):
                    file.seek(self._start + (channel * total + first) * self._area)
                    data = bytearray(file.read(count * self._area))
                    rows.append(torch.frombuffer(data, dtype=self._dtype))
                yield torch.stack(rows).view(channels, count, height, width)

    @property
    def _area(self) -> int:
        """Bytes of one frame of one channel."""
        return self.shape[2] * self.shape[3] * self._dtype.itemsize


def _read_header(file: BinaryIO, path: Path) -> tuple[int, dict]:
    start = file.read(8)
    try:
        length = struct.unpack("<Q", start)[0]
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        return 8 + length, json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
