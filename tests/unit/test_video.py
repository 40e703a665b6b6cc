"""Written videos read back, and the contact sheet shows what it should."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hunyuan_train.evaluation.config import SampleConfig
from hunyuan_train.evaluation.sample import SampledVideo
from hunyuan_train.evaluation.video import (
    even_frames,
    to_uint8,
    write_contact_sheet,
    write_mp4,
    write_sample,
)


def moving_bar(frames: int = 9, height: int = 48, width: int = 64) -> Tensor:
    """A red bar over blue, its left edge at 4 * frame."""
    pixels = torch.full((3, frames, height, width), -0.8)
    pixels[2] = 0.4
    for frame in range(frames):
        pixels[0, frame, :, 4 * frame : 4 * frame + 16] = 0.8
        pixels[2, frame, :, 4 * frame : 4 * frame + 16] = -0.8
    return pixels


def read(path: Path) -> tuple[np.ndarray, "av.VideoStream"]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1  # BT.709, written down and not left to players
        return np.stack(frames), stream


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_mp4_reads_back(tmp_path: Path, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    pixels = moving_bar()
    path = write_mp4(tmp_path / "new" / "a.mp4", pixels, fps=24, crf=10, codec=codec)
    frames, stream = read(path)
    assert frames.shape == (9, 48, 64, 3)
    assert stream.average_rate == 24
    assert stream.codec_context.name in (codec, "h264")
    error = np.abs(frames.astype(int) - to_uint8(pixels).astype(int))
    assert error.mean() < 6
    # Away from the bar's edges, where 4:2:0 mixes colours.
    assert error[2, :, 12:20].max() < 24
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_crf_trades_size_for_quality(tmp_path: Path) -> None:
    noise = torch.rand(3, 5, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    good = write_mp4(tmp_path / "good.mp4", noise, fps=8, crf=5)
    small = write_mp4(tmp_path / "small.mp4", noise, fps=8, crf=45)
    assert good.stat().st_size > 2 * small.stat().st_size


def test_odd_sizes_are_padded_to_even_ones(tmp_path: Path) -> None:
    frames, _ = read(write_mp4(tmp_path / "a.mp4", moving_bar(3, 47, 63), fps=8))
    assert frames.shape == (3, 48, 64, 3)


def test_missing_x264_falls_back_to_mpeg4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    _, stream = read(write_mp4(tmp_path / "a.mp4", moving_bar(), fps=8))
    assert stream.codec_context.name == "mpeg4"
    assert "no libx264" in caplog.text


def test_pixels_map_to_bytes() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1)
    assert to_uint8(pixels)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_even_frames_keep_first_and_last() -> None:
    pixels = torch.arange(17.0).view(1, 17, 1, 1).expand(3, 17, 1, 1)
    assert even_frames(pixels, 5)[0, :, 0, 0].tolist() == [0, 4, 8, 12, 16]
    assert even_frames(pixels[:, :1], 5).shape[1] == 1


def solid(colour: tuple[float, float, float], frames: int = 9, size: int = 32) -> Tensor:
    return torch.tensor(colour).view(3, 1, 1, 1).expand(3, frames, size, size)


def test_sheet_has_a_row_of_frames_and_a_caption_per_video(tmp_path: Path) -> None:
    videos = [solid((1, -1, -1)), solid((-1, 1, -1), frames=1)]
    path = write_contact_sheet(tmp_path / "s.png", videos, ["a red one", "ein grünes, 緑"], 4)
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    red = (sheet == [255, 0, 0]).all(axis=2)
    green = (sheet == [0, 255, 0]).all(axis=2)
    assert red.sum() == 4 * 160 * 160  # 32 px enlarged five times
    assert green.sum() == 160 * 160
    red_rows, green_rows = np.flatnonzero(red.any(axis=1)), np.flatnonzero(green.any(axis=1))
    assert red_rows.max() < green_rows.min()
    between = sheet[red_rows.max() + 1 : green_rows.min()]
    assert (between.sum(axis=2) < 200).sum() > 20  # the caption's ink
    assert sheet.shape[1] <= 4 * 165 + 4


def test_sheet_size_is_bounded(tmp_path: Path) -> None:
    videos = [solid((0, 0, 0), frames=40, size=512)] * 5
    path = write_contact_sheet(
        tmp_path / "s.png", videos, ["word " * 500] * 5, columns=3, cell_px=64, max_rows=2
    )
    width, height = Image.open(path).size
    assert width <= 3 * 68 + 4
    assert height <= 2 * (64 + 12 + 2 * 13) + 13 + 4


def test_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no videos for the contact sheet"):
        write_contact_sheet(tmp_path / "s.png", [], [])


def test_samples_become_named_files(tmp_path: Path) -> None:
    cfg = SampleConfig(fps=12, crf=20)
    samples = [
        SampledVideo(prompt="a bar", prompt_index=0, repeat=0, pixels=moving_bar()),
        SampledVideo(prompt="a still", prompt_index=1, repeat=0, pixels=moving_bar(1)),
        SampledVideo(prompt="a still", prompt_index=1, repeat=1, pixels=moving_bar(1)),
    ]
    paths = [write_sample(tmp_path / "new", sample, cfg) for sample in samples]
    assert [path.name for path in paths] == ["000-0.mp4", "001-0.png", "001-1.png"]
    assert read(paths[0])[1].average_rate == 12
    still = np.asarray(Image.open(paths[1]))
    assert np.array_equal(still, to_uint8(moving_bar(1))[0])
