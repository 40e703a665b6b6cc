"""What decoding processes run for one file; nothing here may import torch."""

from pathlib import Path

import numpy as np

from hunyuan_train.data.buckets import Assign, Assignment, Bucket, BucketTable
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.dataset import SampleShape, Window, decode_samples, probe_samples
from hunyuan_train.data.quarantine import MediaError, Reason


def probe_file(path: str, media: str, cfg: DataConfig) -> list[SampleShape]:
    """Return the samples of a file, without decoding more than a frame.

    Raises:
        MediaError: It cannot become a sample.
    """
    return probe_samples(Path(path), media, cfg, cfg.bucket_table())


def decode_clip(
    path: str,
    media: str,
    bucket: Bucket,
    anchor: int,
    cfg: DataConfig,
    window: Window | None = None,
) -> np.ndarray:
    """Return the pixels of one sample of a file, uint8 [F, H, W, 3]; see ``decode_samples``.

    Raises:
        MediaError: It is damaged, or has changed since it was probed.
    """
    (sample,) = decode_samples(Path(path), media, cfg, _OneBucket(cfg, bucket, anchor), window)
    return sample.pixels


class _OneBucket(BucketTable):
    """The table of a config, of which a file gets one bucket only."""

    def __init__(self, cfg: DataConfig, bucket: Bucket, anchor: int) -> None:
        super().__init__(cfg.anchors, cfg.durations, cfg.max_aspect, cfg.bucket_stride)
        self._wanted = (bucket, anchor)

    def assign(
        self,
        height: int,
        width: int,
        frames: int,
        mode: Assign = Assign.nearest,
        max_upscale: float = 1.0,
        max_crop_loss: float = 1.0,
    ) -> list[Assignment]:
        """Return the one assignment that is wanted."""
        items = super().assign(height, width, frames, mode, max_upscale, max_crop_loss)
        found = [item for item in items if (item.bucket, item.anchor) == self._wanted]
        if not found:
            raise MediaError(
                Reason.damaged, f"it has changed and does not fit bucket {self._wanted[0]} now"
            )
        return found
