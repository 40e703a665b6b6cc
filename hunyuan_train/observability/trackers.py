"""Where rows of metrics go: a JSONL file, TensorBoard, Weights & Biases."""

import io
import json
import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hunyuan_train.observability.config import LoggingConfig, WandbMode

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

Row = Mapping[str, float | int | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """One picture or video of a step."""

    name: str
    """The same at every step, such as ``samples/000-0``."""
    path: Path
    """A png or mp4 file."""
    caption: str = ""
    moving: "Sequence[Image.Image]" = ()
    """Small frames of a video, for destinations that play no mp4."""


class Tracker(Protocol):
    """A destination of metrics."""

    def log(self, step: int, row: Row) -> None:
        """Record the values of ``step``."""
        ...

    def media(self, step: int, items: Sequence[Media]) -> None:
        """Record pictures and videos of ``step``, maybe after later values; on any thread."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


class JsonlTracker:
    """One JSON object per line in ``metrics.jsonl``: step, time (Unix seconds) and the values.

    Not-a-number and infinities become null, because JSON has neither.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        """Open ``path`` for appending, without the rows after ``start_step``.

        A run that goes on from an older checkpoint repeats steps; their first rows, and a last line
        that was cut off when the process died, are dropped.
        """
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _row_step(line) <= start_step]
            scratch = path.with_name(path.name + ".tmp")
            scratch.write_text("".join(f"{line}\n" for line in kept))
            scratch.replace(path)
        self._stream = path.open("a", buffering=1)

    def log(self, step: int, row: Row) -> None:
        """Append one line."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._stream.write(
            json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n"
        )

    def media(self, step: int, items: Sequence[Media]) -> None:
        """Leave them where they are: a file of numbers has no place for them."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _row_step(line: str) -> float:
    """Return the step of a line, or infinity if the line is cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoardTracker:
    """Scalars and texts in TensorBoard event files."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Write into ``folder``; TensorBoard then hides older events after ``start_step``."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(self, step: int, row: Row) -> None:
        """Add numbers as scalars and strings as texts."""
        for name, value in row.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def media(self, step: int, items: Sequence[Media]) -> None:
        """Add pictures, and of videos their small frames as a moving picture, with captions."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import (
            Summary,  # pyright: ignore[reportAttributeAccessIssue]
        )

        for item in items:
            if not item.moving and item.path.suffix == ".mp4":
                continue
            data = _gif(item.moving) if item.moving else item.path.read_bytes()
            width, height = Image.open(io.BytesIO(data)).size
            picture = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=data
            )
            summary = Summary(value=[Summary.Value(tag=item.name, image=picture)])
            self._writer._get_file_writer().add_summary(summary, step)
            if item.caption:
                self._writer.add_text(f"{item.name}/prompt", item.caption, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; a restart continues it by the id in ``wandb_id.txt``."""

    def __init__(self, run_dir: Path, cfg: LoggingConfig, run_config: Mapping[str, Any]) -> None:
        """Start or continue the run.

        Raises:
            ValueError: The package is not installed.
        """
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ValueError(
                f"logging.wandb_mode={cfg.wandb_mode.value} needs the wandb package: "
                "pip install 'hunyuan_train[wandb]', or set logging.wandb_mode=disabled"
            ) from error
        id_file = run_dir / "wandb_id.txt"
        known = id_file.exists()
        if not known:
            id_file.write_text(secrets.token_hex(8))
        offline = cfg.wandb_mode is WandbMode.offline
        self._run = wandb.init(
            mode=cfg.wandb_mode.value,
            project=cfg.wandb_project,
            name=cfg.wandb_name or run_dir.name,
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            resume=None if offline or not known else "allow",
            config=dict(run_config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, row: Row) -> None:
        """Send one row."""
        self._run.log(dict(row), step=step)

    def media(self, step: int, items: Sequence[Media]) -> None:
        """Upload pictures and videos, on an axis of their own: wandb takes no step twice."""
        import wandb

        found: dict[str, Any] = {"media_step": step}
        for item in items:
            self._run.define_metric(item.name, step_metric="media_step")
            video = item.path.suffix == ".mp4"
            kind = wandb.Video if video else wandb.Image
            found[item.name] = kind(str(item.path), caption=item.caption or None)
        # Without a commit it goes along with the next row of metrics.
        self._run.log(found, commit=False)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _gif(frames: "Sequence[Image.Image]") -> bytes:
    buffer = io.BytesIO()
    first, *rest = frames
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=125, loop=0)
    return buffer.getvalue()


def build_trackers(
    run_dir: Path, cfg: LoggingConfig, start_step: int, run_config: Mapping[str, Any]
) -> list[Tracker]:
    """Build the trackers that ``cfg`` asks for and log which ones they are."""
    run_dir.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = [
        JsonlTracker(run_dir / "metrics.jsonl", start_step),
        TensorBoardTracker(run_dir / "tensorboard", start_step),
    ]
    if cfg.wandb_mode is not WandbMode.disabled:
        trackers.append(WandbTracker(run_dir, cfg, run_config))
    log.info("metrics go to %s (wandb %s)", run_dir, cfg.wandb_mode.value)
    return trackers
