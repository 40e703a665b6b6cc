import json
from pathlib import Path

import av
import numpy as np
import pytest
from media_factory import box_offset, frame_numbers, marked_frames, write_image, write_video
from PIL import Image

from hunyuan_train.data import dataset
from hunyuan_train.data import decode as decode_module
from hunyuan_train.data.config import ClipStart, DataConfig, Integrity
from hunyuan_train.data.dataset import decode_samples, frame_stride
from hunyuan_train.data.decode import VideoReader
from hunyuan_train.data.quarantine import MediaError, Reason


def decode(path: Path, media: str = "video", **settings):
    cfg = DataConfig(**{"anchors": [48], "durations": [1, 5, 9], "assign": "every", **settings})
    return decode_samples(path, media, cfg, cfg.bucket_table())


def failure(path: Path, media: str = "video", **settings) -> MediaError:
    with pytest.raises(MediaError) as caught:
        decode(path, media, **settings)
    return caught.value


def test_clip_serves_every_duration_from_its_head(tmp_path):
    samples = decode(write_video(tmp_path / "a.mp4", marked_frames(12)))
    assert [sample.bucket.frames for sample in samples] == [1, 5, 9]
    assert [frame_numbers(sample.pixels) for sample in samples] == [
        [0],
        list(range(5)),
        list(range(9)),
    ]
    assert [sample.fps for sample in samples] == pytest.approx([0, 24, 24], abs=0.05)


def test_centre_start_leaves_the_same_rest_on_both_sides(tmp_path):
    path = write_video(tmp_path / "a.mp4", marked_frames(13))
    samples = decode(path, clip_start=ClipStart.centre, durations=[5])
    assert frame_numbers(samples[0].pixels) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fps", "stride"), [(8, 1), (30, 1), (49.9, 1), (50, 2), (59.94, 2), (60, 2), (120, 3)]
)
def test_fast_clips_are_thinned_below_the_limit(fps, stride):
    assert frame_stride(fps, 50.0) == stride


def test_clip_at_60_fps_keeps_every_second_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", marked_frames(20), fps=60)
    samples = decode(path)
    assert frame_numbers(samples[-1].pixels) == list(range(0, 18, 2))
    assert samples[-1].fps == pytest.approx(30, abs=0.1)


def test_variable_frame_rate_is_sampled_evenly_in_time(tmp_path):
    # Four frames at 20 fps, then four at 5 fps: a mean interval of 0.95 / 7 s.
    times = [0.0, 0.05, 0.1, 0.15, 0.35, 0.55, 0.75, 0.95]
    path = write_video(tmp_path / "a.mp4", marked_frames(8), times=times)
    (sample,) = decode(path, durations=[5])
    grid = [k * 0.95 / 7 for k in range(5)]
    nearest = [min(range(8), key=lambda index: abs(times[index] - t)) for t in grid]
    assert frame_numbers(sample.pixels) == nearest
    assert nearest != list(range(5))


@pytest.mark.parametrize(("rotation", "corner"), [(90, 2), (-90, 1), (180, 3)])
def test_rotation_metadata_is_applied(tmp_path, rotation, corner):
    # A bright top-left quarter moves to another corner when the picture is turned upright.
    frame = np.full((64, 96, 3), 16, np.uint8)
    frame[:32, :48] = 235
    path = write_video(tmp_path / "a.mp4", [frame] * 2, rotation=rotation)
    with VideoReader(path) as reader:
        size = (64, 96) if rotation % 180 else (96, 64)
        assert (reader.info.width, reader.info.height) == size
    (sample,) = decode(path, durations=[1])
    picture = sample.pixels[0].astype(int).mean(-1)
    height, width = picture.shape
    halves = (slice(0, height // 2), slice(height // 2, height))
    columns = (slice(0, width // 2), slice(width // 2, width))
    corners = [picture[rows, cols].mean() for rows in halves for cols in columns]
    assert int(np.argmax(corners)) == corner


def test_only_wanted_frames_are_converted_however_long_the_clip(tmp_path, monkeypatch):
    converted = []
    convert = dataset.frame_pixels
    monkeypatch.setattr(
        dataset, "frame_pixels", lambda *args: converted.append(1) or convert(*args)
    )
    path = write_video(tmp_path / "a.mp4", marked_frames(50))
    decode(path, durations=[5])
    assert len(converted) == 5


def test_used_integrity_stops_after_the_last_wanted_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", marked_frames(40), gop=4)
    with VideoReader(path) as reader:
        list(reader.read([0, 1, 2], check_rest=False))
        assert reader._decoded < 12
    with VideoReader(path) as reader:
        list(reader.read([0, 1, 2], check_rest=True))
        assert reader._decoded == 40


def test_first_video_stream_is_read_not_the_largest(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as out:
        streams = []
        for size in (64, 128):
            stream = out.add_stream("libx264", rate=24)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        for index in range(5):
            for stream in streams:
                pixels = np.zeros((stream.height, stream.width, 3), np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = index
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode())
    with VideoReader(path) as reader:
        assert reader.info.width == 64


def test_hidden_alt_ref_frames_are_not_promised(tmp_path):
    plain = write_video(
        tmp_path / "plain.webm", marked_frames(20), codec="libvpx", options={"crf": "4"}
    )
    path = tmp_path / "hidden.webm"
    with av.open(str(plain)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if not packet.size:
                continue
            packet.stream = stream
            if number == 7:  # what alternate references look like: show_frame cleared, own time
                data = bytearray(bytes(packet))
                data[0] &= ~0x10
                hidden = av.Packet(bytes(data))
                hidden.time_base = packet.time_base
                hidden.pts = hidden.dts = packet.pts - 10
                hidden.stream = stream
                out.mux(hidden)
            out.mux(packet)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 21
    with VideoReader(path) as reader:
        assert reader.info.frames == 20
    assert len(decode(path)) == 3


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_very_short_clip_is_an_image_where_images_are_wanted(tmp_path, frames):
    path = write_video(tmp_path / "a.mp4", marked_frames(frames))
    assert [sample.bucket.frames for sample in decode(path)] == [1]
    error = failure(path, durations=[5, 9])
    assert error.reason == Reason.too_short
    assert f"too short: {frames} usable frames" in error.detail


def test_odd_size_clip_without_duration_decodes(tmp_path):
    frames = marked_frames(6, height=121, width=161)
    path = write_video(tmp_path / "a.mkv", frames, pix_fmt="yuv444p")
    assert frame_numbers(decode(path)[-1].pixels) == [0, 1, 2, 3, 4]


def test_truncated_file_says_so(tmp_path):
    path = write_video(tmp_path / "a.mp4", marked_frames(40), faststart=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    error = failure(path)
    assert error.reason == Reason.truncated
    assert "mdat box ends at byte" in error.detail


def test_missing_index_says_so(tmp_path):
    path = write_video(tmp_path / "a.mp4", marked_frames(40))
    path.write_bytes(path.read_bytes()[: box_offset(path, b"moov")])
    error = failure(path)
    assert error.reason == Reason.truncated
    assert "index (moov box) is missing" in error.detail


def test_truncated_matroska_says_so(tmp_path):
    path = write_video(tmp_path / "a.mkv", marked_frames(40))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    error = failure(path)
    assert error.reason == Reason.truncated
    assert "Matroska segment declares" in error.detail


def test_flipped_bits_count_as_damage(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 96, 128, 3)).astype(np.uint8)
    path = write_video(tmp_path / "a.mp4", list(noise))
    data = bytearray(path.read_bytes())
    start = box_offset(path, b"mdat")
    for offset in range(start + 60_000, start + 60_400, 7):
        data[offset] ^= 0xFF
    path.write_bytes(bytes(data))
    error = failure(path)
    assert error.reason == Reason.damaged
    assert "do not decode" in error.detail or "corrupt frames" in error.detail


def test_frames_that_silently_never_come_count_as_damage(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", marked_frames(12))
    index_packets = decode_module._index_packets

    def promise_one_more(path):
        keys, packets = index_packets(path)
        times = np.append(keys.times, keys.times[-1] + 0.04)
        return decode_module._FrameKeys([*keys.pts, keys.pts[-1] + 640], times), packets + 1

    monkeypatch.setattr(decode_module, "_index_packets", promise_one_more)
    error = failure(path)
    assert (error.reason, error.detail) == (Reason.damaged, "12 of 13 frames decode")


def test_damage_after_the_wanted_frames_is_found_unless_switched_off(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 96, 128, 3)).astype(np.uint8)
    path = write_video(tmp_path / "a.mp4", list(noise), gop=4)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    position, size = packets[30]
    data[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(bytes(data))
    assert failure(path).reason == Reason.damaged
    assert len(decode(path, integrity=Integrity.used)) == 3


@pytest.mark.parametrize(
    ("name", "content", "reason", "detail"),
    [
        ("a.mp4", b"", Reason.empty, "empty"),
        ("a.mp4", b"just some words\n" * 50, Reason.mislabelled, "plain text named .mp4"),
        ("a.mp4", b"<!DOCTYPE html><html></html>", Reason.mislabelled, "an HTML page"),
        ("a.mp4", bytes(range(200, 256)) * 90, Reason.unrecognised, "header is garbage"),
        ("a.jpg", b"", Reason.empty, "empty"),
        ("a.png", b"not a picture", Reason.mislabelled, "plain text named .png"),
        ("a.jpg", bytes(range(200, 256)) * 90, Reason.unrecognised, "header is garbage"),
    ],
)
def test_mislabelled_content_is_named(tmp_path, name, content, reason, detail):
    path = tmp_path / name
    path.write_bytes(content)
    error = failure(path, "image" if path.suffix in (".jpg", ".png") else "video")
    assert error.reason == reason
    assert detail in error.detail


def test_image_named_as_video_and_video_named_as_image(tmp_path):
    image = write_image(tmp_path / "a.jpg")
    error = failure(image.rename(tmp_path / "a.mp4"))
    assert (error.reason, error.detail) == (
        Reason.mislabelled,
        "a JPEG image named .mp4, not a video",
    )
    video = write_video(tmp_path / "b.mp4", marked_frames(3))
    error = failure(video.rename(tmp_path / "b.png"), "image")
    assert error.detail == "an MP4 or MOV file named .png, not an image"


def test_audio_only_file_says_so(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 4096), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        frame.pts = 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    error = failure(path)
    assert error.reason == Reason.no_video
    assert "no video stream, only audio (aac)" in error.detail


def pixel(path: Path) -> list[int]:
    (sample,) = decode(path, "image", durations=[1])
    return sample.pixels[0, 24, 24].tolist()


def test_image_modes_become_rgb(tmp_path):
    solid = Image.new("RGBA", (64, 64), (200, 100, 50, 255))
    solid.save(tmp_path / "rgba.png")
    assert pixel(tmp_path / "rgba.png") == [200, 100, 50]
    Image.new("RGBA", (64, 64), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert pixel(tmp_path / "clear.png") == [255, 255, 255]
    Image.new("LA", (64, 64), (0, 51)).save(tmp_path / "la.png")
    assert pixel(tmp_path / "la.png") == [204, 204, 204]
    solid.convert("RGB").quantize(4).save(tmp_path / "palette.png")
    assert np.allclose(pixel(tmp_path / "palette.png"), [200, 100, 50], atol=3)
    deep = np.full((64, 64), 40_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "deep.png") == [156] * 3
    Image.new("L", (64, 64), 77).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "grey.png") == [77] * 3
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red, green, blue = pixel(tmp_path / "cmyk.jpg")
    assert red > 230
    assert max(green, blue) < 30


def test_exif_orientation_is_applied(tmp_path):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :48] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned 90 degrees clockwise: the left half comes to the top
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (sample,) = decode(tmp_path / "a.jpg", "image", durations=[1])
    assert sample.bucket.height > sample.bucket.width
    assert sample.pixels[0, :10].mean() > 240
    assert sample.pixels[0, -10:].mean() < 15


def test_half_an_image_is_truncated(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    for suffix in (".jpg", ".png"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(noise).save(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        error = failure(path, "image")
        assert error.reason == Reason.truncated
        assert "ends too early" in error.detail


def test_one_pixel_image_is_enlarged(tmp_path):
    path = write_image(tmp_path / "a.png", 1, 1, level=90)
    (sample,) = decode(path, "image", durations=[1])
    assert sample.pixels.shape == (1, 48, 48, 3)
    assert (sample.pixels == 90).all()
    assert sample.scale == 48


def test_video_colours_survive(tmp_path):
    frame = np.empty((64, 64, 3), np.uint8)
    frame[:] = (40, 200, 60)
    path = write_video(tmp_path / "a.mp4", [frame] * 3)
    (sample,) = decode(path, durations=[1])
    assert np.abs(sample.pixels[0, 20, 20].astype(int) - (40, 200, 60)).max() <= 4


def test_pixels_are_json_free_uint8(tmp_path):
    (sample,) = decode(write_image(tmp_path / "a.png"), "image", durations=[1])
    assert sample.pixels.dtype == np.uint8
    json.dumps([sample.fps, sample.scale, sample.crop_loss])
