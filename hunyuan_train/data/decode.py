"""Video decoding: upright frames chosen by time, resized while decoding, damage reported.

PyAV is only used in this file. Where decoders disagree, this reader decides once: the first video
stream that is not cover art, rotation metadata applied, frames selected by timestamp (so variable
frame rates work), and a file counts as damaged when any packet fails, any frame is flagged corrupt,
or fewer frames come out than were promised.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation

from hunyuan_train.data.buckets import Bucket, CoverCrop
from hunyuan_train.data.quarantine import MediaError, Reason
from hunyuan_train.data.sniff import Family, check_complete, sniff

_SQUARE_PIXEL_TOLERANCE = 0.01
"""Sample aspect ratios this near 1 are encoder rounding (854x480 of 16:9), not anamorphic video."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is; sizes in upright display pixels, ``fps`` the mean rate."""

    width: int
    height: int
    rotation: int
    """Counterclockwise turn in degrees that makes the stored picture upright: 0, 90, 180 or -90."""
    frames: int
    fps: float
    codec: str


class VideoReader:
    """Reads chosen frames of one video file; use it as a context manager.

    Memory stays at one decoded frame whatever the length of the file: frames that are not asked for
    are decoded (video codecs need them) but neither converted nor kept.

    Args:
        path: The file.

    Raises:
        MediaError: The file is empty, not a video, truncated, or its first frame does not decode.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_content(path)
        self._keys, promised = _index_packets(path)
        self._container = _open(path)
        self._decoded = 0
        self._corrupt_frames = 0
        self._failed_packets: list[int] = []
        try:
            stream = _video_stream(self._container)
            # Order and content do not depend on the thread count; workers decode whole files.
            stream.codec_context.thread_count = 1
            self._frames = self._decode(stream)
            self._first = next(self._frames, None)
            if self._first is None:
                raise MediaError(Reason.damaged, f"none of its {promised} packets decodes")
            self.info = self._describe(stream, self._first)
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._container.close()

    def choose(
        self, count: int, stride: int, *, centre: bool = False, offset: float = 0.0
    ) -> list[int]:
        """Choose ``count`` frames on an even time grid of ``stride`` mean frame intervals.

        Each grid time takes the frame nearest to it. With a constant frame rate that is every
        ``stride``-th frame; with a variable rate frames repeat or drop out, so motion keeps its
        speed.

        Args:
            count: Frames to choose.
            stride: Grid step in mean frame intervals.
            centre: Centre the grid in the clip.
            offset: Else, where in the clip the grid begins: from 0, at its first frame, to below 1,
                as late as it can.

        Returns:
            Frame indices in presentation order; they may repeat.
        """
        slack = self.info.frames - 1 - (count - 1) * stride
        assert slack >= 0, "more frames chosen than the clip has"
        times = self._keys.times
        interval = (times[-1] - times[0]) / max(len(times) - 1, 1)
        start = slack // 2 if centre else int(offset * (slack + 1))
        grid = times[0] + interval * (start + stride * np.arange(count))
        after = np.clip(np.searchsorted(times, grid), 1, max(len(times) - 1, 1))
        if len(times) == 1:
            return [0] * count
        nearer_before = grid - times[after - 1] <= times[after] - grid
        return [int(index) for index in after - nearer_before]

    def read(
        self, indices: Collection[int], *, check_rest: bool
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (index, stored frame) for the wanted indices, in order; once per reader.

        Args:
            indices: Wanted frames, from :meth:`choose`.
            check_rest: Decode the rest of the file too, to find damage there.

        Raises:
            MediaError: A packet failed, a frame is corrupt, or frames are missing.
        """
        wanted = {self._keys.key(index): index for index in indices}
        position = 0
        frame = self._first
        while frame is not None:
            key = frame.pts if self._keys.by_pts else position
            index = None if key is None else wanted.pop(key, None)
            if index is not None:
                yield index, frame
            if not wanted and not check_rest:
                break
            position += 1
            frame = next(self._frames, None)
        promised = len(self._keys.times) if check_rest else 0
        self._check_damage(promised, len(wanted))

    def _decode(self, stream: Any) -> Iterator[av.VideoFrame]:
        number = -1
        try:
            for packet in self._container.demux(stream):
                number += packet.size > 0
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    # Counted, not raised: one bad packet must not hide how bad the file is.
                    self._failed_packets.append(number)
                    continue
                for frame in frames:
                    self._decoded += 1
                    self._corrupt_frames += bool(frame.is_corrupt)
                    yield frame
        except av.FFmpegError as error:
            raise MediaError(
                Reason.damaged, f"reading stops at packet {number + 1}: {error.strerror}"
            ) from error

    def _check_damage(self, promised: int, not_found: int) -> None:
        problems: list[str] = []
        if self._failed_packets:
            where = ", ".join(str(number) for number in self._failed_packets[:5])
            count = len(self._failed_packets)
            problems.append(f"packets that do not decode: {count} (number {where})")
        if self._corrupt_frames:
            problems.append(f"corrupt frames: {self._corrupt_frames}")
        if promised > self._decoded:
            problems.append(f"{self._decoded} of {promised} frames decode")
        elif not_found:
            problems.append(f"wanted frames that never decode: {not_found}")
        if problems:
            raise MediaError(Reason.damaged, "; ".join(problems))

    def _describe(self, stream: Any, frame: av.VideoFrame) -> VideoInfo:
        rotation = round(frame.rotation / 90) * 90
        width, height = frame.width, frame.height
        aspect = float(stream.sample_aspect_ratio or 1)
        if abs(aspect - 1) > _SQUARE_PIXEL_TOLERANCE:
            width = max(1, round(width * aspect))
        if rotation % 180:
            width, height = height, width
        return VideoInfo(
            width=width,
            height=height,
            rotation=rotation,
            frames=len(self._keys.times),
            fps=self._keys.fps(float(stream.average_rate or 0)),
            codec=stream.codec_context.name,
        )


def frame_pixels(
    frame: av.VideoFrame, rotation: int, bucket: Bucket, cover: CoverCrop
) -> np.ndarray:
    """Resize (swscale, bicubic), turn upright and crop one frame: uint8 [height, width, 3]."""
    width, height = cover.resize_width, cover.resize_height
    if rotation % 180:
        width, height = height, width
    # Planar output: swscale's packed rgb24 path halves the chroma again and is 1-2 levels too dark
    # (error against a full-size conversion 0.8 levels rms instead of 2.6, at the same cost).
    resized = frame.reformat(width, height, "gbrp", interpolation=Interpolation.BICUBIC)
    upright = np.rot90(resized.to_ndarray(), rotation // 90)
    rows = slice(cover.top, cover.top + bucket.height)
    columns = slice(cover.left, cover.left + bucket.width)
    return np.ascontiguousarray(upright[rows, columns])


@dataclass(frozen=True, slots=True)
class _FrameKeys:
    """Presentation times of the shown frames, and what identifies each while decoding."""

    pts: list[int] | None
    times: np.ndarray
    """Seconds, float64, ascending; one per shown frame."""

    @property
    def by_pts(self) -> bool:
        return self.pts is not None

    def key(self, index: int) -> int:
        return index if self.pts is None else self.pts[index]

    def fps(self, declared: float) -> float:
        """Frames per second from the timestamps, else as declared; rounded so 50 stays 50."""
        seconds = float(self.times[-1] - self.times[0])
        return round((len(self.times) - 1) / seconds, 2) if seconds > 0 else round(declared, 2)


def _check_content(path: Path) -> None:
    if path.stat().st_size == 0:
        raise MediaError(Reason.empty, "the file is empty (0 bytes)")
    content = sniff(path)
    if content.family in (Family.text, Family.other) or (
        content.family == Family.image and path.suffix.lower() != ".gif"
    ):
        raise MediaError(Reason.mislabelled, f"{content.name} named {path.suffix}, not a video")
    check_complete(path)
    if content.family == Family.unknown:
        # Rarer containers have no entry in the magic table; FFmpeg has the last word.
        try:
            _open(path).close()
        except MediaError as error:
            raise MediaError(
                Reason.unrecognised,
                "the header is garbage: the first bytes match no known media format",
            ) from error


def _open(path: Path) -> Any:
    # Non-UTF-8 tags must not fail a good file; av 19 ignores them and drops the argument.
    older = int(av.__version__.split(".")[0]) < 19
    options: dict[str, Any] = {"metadata_errors": "ignore"} if older else {}
    try:
        return av.open(str(path), **options)
    except av.FFmpegError as error:
        raise MediaError(
            Reason.damaged, f"{sniff(path).name} that does not open: {error.strerror}"
        ) from error


def _video_stream(container: Any) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    audio = ", ".join(stream.codec_context.name for stream in container.streams.audio)
    detail = f"only audio ({audio})" if audio else "no audio either"
    raise MediaError(Reason.no_video, f"it has no video stream, {detail}")


def _index_packets(path: Path) -> tuple[_FrameKeys, int]:
    """List the timestamps of all shown frames without decoding any."""
    with _open(path) as container:
        stream = _video_stream(container)
        codec, time_base = stream.codec_context.name, stream.time_base
        pts: list[int | None] = []
        packets = 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                packets += 1
                if not packet.is_discard and not _is_hidden(codec, packet):
                    pts.append(packet.pts)
        except av.FFmpegError as error:
            raise MediaError(
                Reason.truncated, f"reading stops at packet {packets}: {error.strerror}"
            ) from error
        # Containers of the MP4 kind write the sample count; others leave 0.
        if stream.frames > packets:
            raise MediaError(
                Reason.truncated, f"{packets} of the {stream.frames} frames it declares are there"
            )
        if not pts:
            raise MediaError(Reason.damaged, "its video stream holds no frames")
        known = sorted({value for value in pts if value is not None})
        if len(known) == len(pts):
            keys = _FrameKeys(known, np.array([float(value * time_base) for value in known]))
        else:
            interval = 1.0 / float(stream.average_rate or 25)
            keys = _FrameKeys(None, np.arange(len(pts)) * interval)
        return keys, packets


def _is_hidden(codec: str, packet: av.Packet) -> bool:
    """Tell whether a VP8 or VP9 packet is an alternate reference frame that is never shown.

    The flag is ``show_frame`` of the frame header: bit 4 of the first byte in VP8 (RFC 6386, 9.1);
    in VP9 (bitstream specification, 6.2) it follows marker, profile, ``show_existing_frame`` and
    ``frame_type``. A VP9 superframe ends in a marker byte 110xxxxx and always shows one frame.
    """
    if not codec.startswith(("vp8", "vp9", "libvpx")):
        return False
    data = bytes(packet)
    first = data[0]
    if codec in ("vp8", "libvpx"):
        return not first >> 4 & 1
    if data[-1] & 0xE0 == 0xC0:
        return False
    shift = 1 if first >> 4 & 3 == 3 else 0  # profile 3 has a reserved bit more
    show_existing = first >> (3 - shift) & 1
    return not show_existing and not first >> (1 - shift) & 1
