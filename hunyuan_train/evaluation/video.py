"""Writing samples: mp4 files, still images, and one contact sheet of all prompts."""

import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hunyuan_train.evaluation.config import SampleConfig
from hunyuan_train.evaluation.sample import SampledVideo

logger = logging.getLogger(__name__)

SHEET_COLUMNS = 6
SHEET_CELL_PX = 160
SHEET_MAX_ROWS = 64
_GAP_PX = 4
_LINE_PX = 13
_MAX_CAPTION_LINES = 2
_BT709 = 1
"""Number of BT.709 in the primaries and transfer tables of ITU-T H.273."""


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Turn pixels [3, F, H, W] in [-1, 1] into RGB frames [F, H, W, 3] uint8."""
    scaled = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(1, 2, 3, 0).numpy())


def choose_codec() -> str:
    """Return "libx264", or "mpeg4" where this build of FFmpeg has no x264."""
    if "libx264" in av.codecs_available:
        return "libx264"
    logger.warning("this build of PyAV has no libx264; videos are written with mpeg4 instead")
    return "mpeg4"


def write_mp4(
    path: Path | str, pixels: Tensor, fps: int, crf: int = 18, codec: str | None = None
) -> Path:
    """Write one video as yuv420p mp4.

    An odd height or width gets its last row or column twice, since yuv420p halves both. The file
    appears under its name only when it is complete.

    Args:
        path: of the mp4 file; its folder is created.
        pixels: [3, F, H, W] in [-1, 1].
        fps: frames per second.
        crf: quality, 0 (best) to 51.
        codec: encoder name; `choose_codec()` when None.

    Returns:
        The path.
    """
    with Mp4Writer(path, fps, crf, codec) as writer:
        writer.add(pixels)
    return Path(path)


class Mp4Writer:
    """Writes an mp4 piece by piece; see :func:`write_mp4`."""

    def __init__(
        self, path: Path | str, fps: int | Fraction, crf: int = 18, codec: str | None = None
    ) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self.frames = 0
        """Frames written so far."""
        codec = codec or choose_codec()
        self._container = av.open(str(self._partial), mode="w", format="mp4")
        options = _quality(codec, crf)
        stream = self._container.add_stream(codec, rate=fps, options=options)
        self._stream = cast(av.VideoStream, stream)

    def add(self, pixels: Tensor) -> None:
        """Append [3, n, H, W] in [-1, 1], of the same size every time."""
        frames = to_uint8(pixels)
        _, height, width, _ = frames.shape
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self.frames == 0:
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
            _tag_bt709(self._stream.codec_context)
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            self._container.mux(self._stream.encode(yuv))
        self.frames += len(frames)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file and give it its name; leave it partial if something failed."""
        if error is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if error is None:
            self._partial.replace(self._path)


def _tag_bt709(context: av.VideoCodecContext) -> None:
    """Say in the file which colour matrix it uses; untagged HD and SD files are guessed apart."""
    context.colorspace = Colorspace.ITU709
    context.color_primaries = _BT709
    context.color_trc = _BT709
    context.color_range = ColorRange.MPEG


def _quality(codec: str, crf: int) -> dict[str, str]:
    if codec == "libx264":
        return {"crf": str(crf)}
    # mpeg4 quantizers run from 1 (best) to 31; 18 of 51 becomes 5, which looks about the same.
    quantizer = str(min(31, max(1, round(1 + crf * 0.24))))
    return {"qmin": quantizer, "qmax": quantizer}


def read_video(path: Path | str) -> Tensor:
    """Read an mp4 file of :func:`write_mp4` back as pixels [3, F, H, W] float32 in [-1, 1].

    Raises:
        ValueError: the file is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; sample it first")
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def write_png(path: Path | str, pixels: Tensor) -> Path:
    """Write the first frame of pixels [3, F, H, W] in [-1, 1] as a PNG and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(pixels[:, :1])[0]).save(path)
    return path


def read_png(path: Path | str) -> Tensor:
    """Read an image of :func:`write_png` back as pixels [3, 1, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    return pixels.permute(2, 0, 1)[:, None].float() / 127.5 - 1.0


def even_frames(pixels: Tensor, columns: int) -> Tensor:
    """Return up to `columns` evenly spaced frames of [3, F, H, W], the first and last included."""
    count = min(columns, pixels.shape[1])
    index = torch.linspace(0, pixels.shape[1] - 1, count).round().long()
    return pixels[:, index]


def still_images(pixels: Tensor) -> list[Image.Image]:
    """Return the frames of pixels [3, F, H, W] in [-1, 1] as pictures."""
    return [Image.fromarray(frame) for frame in to_uint8(pixels)]


def write_contact_sheet(
    path: Path | str,
    videos: Sequence[Tensor],
    captions: Sequence[str],
    columns: int = SHEET_COLUMNS,
    cell_px: int = SHEET_CELL_PX,
    max_rows: int = SHEET_MAX_ROWS,
) -> Path:
    """Write one PNG with a row of evenly spaced frames per video and its caption underneath.

    The sheet is at most `columns * cell_px` wide (plus gaps) and `max_rows` rows long; what
    does not fit is counted in its last line.

    Args:
        path: of the PNG file.
        videos: pixels [3, F, H, W] in [-1, 1] each; sizes may differ.
        captions: one per video.
        columns: frames per video.
        cell_px: longer side of a frame on the sheet.
        max_rows: videos on the sheet.

    Raises:
        ValueError: no videos.
    """
    if not videos:
        raise ValueError(f"no videos for the contact sheet {path}; sample at least one prompt")
    assert len(videos) == len(captions), (len(videos), len(captions))
    rows = [_thumbnails(even_frames(video, columns), cell_px) for video in videos[:max_rows]]
    width = max(sum(cell.width + _GAP_PX for cell in row) for row in rows) + _GAP_PX
    width = max(width, columns * (cell_px // 2))
    font = ImageFont.load_default()
    texts = [_wrap(caption, font, width - 2 * _GAP_PX) for caption in captions[:max_rows]]
    if len(videos) > max_rows:
        texts[-1] = [*texts[-1], f"... and {len(videos) - max_rows} more"]
    heights = [
        row[0].height + _GAP_PX + _LINE_PX * len(text) + 2 * _GAP_PX
        for row, text in zip(rows, texts, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    top = _GAP_PX
    for row, text, height in zip(rows, texts, heights, strict=True):
        left = _GAP_PX
        for cell in row:
            sheet.paste(cell, (left, top))
            left += cell.width + _GAP_PX
        for number, line in enumerate(text):
            place = (_GAP_PX, top + row[0].height + _GAP_PX + number * _LINE_PX)
            draw.text(place, line, fill="black", font=font)
        top += height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _thumbnails(pixels: Tensor, cell_px: int) -> list[Image.Image]:
    """Scale frames so that the longer side is near `cell_px`: whole factors up, any factor down."""
    frames = still_images(pixels)
    longer = max(frames[0].size)
    factor = cell_px // longer if longer <= cell_px else cell_px / longer
    width, height = (max(1, round(side * factor)) for side in frames[0].size)
    # Nearest on the way up keeps tiny samples honest: no smoothing hides their pixels.
    method = Image.Resampling.NEAREST if longer <= cell_px else Image.Resampling.LANCZOS
    return [frame.resize((width, height), method) for frame in frames]


def _wrap(
    caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int
) -> list[str]:
    """Break a caption into at most `_MAX_CAPTION_LINES` lines of `width_px`; mark what is cut."""
    if isinstance(font, ImageFont.ImageFont):
        # The bitmap font of a Pillow without FreeType raises on anything beyond Latin-1.
        caption = caption.encode("latin-1", "replace").decode("latin-1")
    lines = [""]
    for word in caption.split() or ["(empty caption)"]:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) <= _MAX_CAPTION_LINES:
        return lines
    kept = lines[:_MAX_CAPTION_LINES]
    return [*kept[:-1], f"{kept[-1]} ..."]


def write_sample(folder: Path | str, sample: SampledVideo, cfg: SampleConfig) -> Path:
    """Write one sample as `000-0.mp4` (prompt index, repeat), a single frame as PNG.

    Returns:
        The path of the file.
    """
    name = f"{sample.prompt_index:03d}-{sample.repeat}"
    if sample.pixels.shape[1] == 1:
        return write_png(Path(folder) / f"{name}.png", sample.pixels)
    return write_mp4(Path(folder) / f"{name}.mp4", sample.pixels, cfg.fps, cfg.crf)
