"""Pixel batches for training a VAE, from the same files and buckets that precompute reads."""

import logging
from collections import defaultdict

import numpy as np
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.dataset import decode_samples
from hunyuan_train.data.manifest import Source, list_sources
from hunyuan_train.data.quarantine import MediaError
from hunyuan_train.encoders.latents import to_model_range
from hunyuan_train.runtime.seed import keyed_generator, keyed_permutation

log = logging.getLogger(__name__)


class PixelBatches:
    """Decoded samples in memory, drawn one bucket at a time; a pure function of the step.

    Args:
        cfg: Where the clips are and the buckets they go to.
        per_media: At most this many images and as many clips are decoded.
        batch_size: Samples in a batch.
        seed: Keys the choice of files and every draw.

    Raises:
        ValueError: if no file can be decoded; files that cannot are logged with the reason.
    """

    def __init__(self, cfg: DataConfig, per_media: int, batch_size: int, seed: int) -> None:
        self._seed, self._batch_size = seed, batch_size
        self._clips: dict[Bucket, list[np.ndarray]] = defaultdict(list)
        table = cfg.bucket_table()
        for source in _chosen(list_sources(cfg.source).sources, per_media, seed):
            try:
                samples = decode_samples(source.path, source.media, cfg, table)
            except MediaError as error:
                log.warning("left out of VAE training: %s: %s", source.file, error)
                continue
            for sample in samples:
                self._clips[sample.bucket].append(sample.pixels)
        if not self._clips:
            raise ValueError(f"data.source={cfg.source} has no file a VAE could be trained on")
        self._buckets = sorted(self._clips)
        sizes = np.array([len(self._clips[bucket]) for bucket in self._buckets], dtype=np.float64)
        self._shares = sizes / sizes.sum()

    def __call__(self, step: int) -> Tensor:
        """Return pixels [B, 3, F, H, W] in [-1, 1]; buckets come as often as they have samples."""
        generator = keyed_generator(self._seed, "vae_batch", step)
        clips = self._clips[self._buckets[generator.choice(len(self._buckets), p=self._shares)]]
        chosen = generator.integers(len(clips), size=self._batch_size)
        return to_model_range([clips[index] for index in chosen])


def _chosen(sources: list[Source], per_media: int, seed: int) -> list[Source]:
    chosen: list[Source] = []
    for media in ("image", "video"):
        ours = [source for source in sources if source.media == media]
        order = keyed_permutation(len(ours), seed, "vae_sources", media)
        chosen += [ours[index] for index in order[:per_media]]
    return chosen
