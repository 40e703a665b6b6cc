"""The order of training: an endless stream of micro-batches that every rank computes alike.

The stream is a pure function of (rows, config, seed). In every epoch each selected sample appears
in exactly one micro-batch. Ranks take turns, so the stream, and with it the meaning of a position,
does not depend on how many ranks there are.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import SampleRow
from hunyuan_train.runtime.seed import keyed_permutation


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one bucket (indices into the selection) and the epoch they are drawn for."""

    epoch: int
    rows: list[int]


class BatchStream:
    """Micro-batch ``position`` of the stream, for any position.

    Args:
        rows: Selected samples.
        cfg: Batch sizes and shuffling.
        seed: Run seed.

    The last micro-batch of a bucket may be smaller than the others; it is kept, because the loss is
    a sum over tokens divided by the tokens of the whole global batch.
    """

    def __init__(self, rows: Sequence[SampleRow], cfg: DataConfig, seed: int) -> None:
        self.members: dict[Bucket, list[int]] = {}
        for index in sorted(range(len(rows)), key=lambda index: rows[index].sample_id):
            self.members.setdefault(rows[index].bucket, []).append(index)
        self.members = dict(sorted(self.members.items()))
        self.batch_sizes = {
            bucket: max(1, min(cfg.max_tokens // bucket.tokens, cfg.max_batch))
            for bucket in self.members
        }
        self.batches_per_epoch = sum(self.num_batches(bucket) for bucket in self.members)
        self.fingerprint = _fingerprint(rows, self.batch_sizes, cfg, seed)
        self._seed = seed
        self._shuffle = cfg.shuffle
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, position: int) -> MicroBatch:
        """Return the micro-batch at ``position`` >= 0; the stream has no end."""
        epoch, offset = divmod(position, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches = self._plan(epoch)
            self._epoch = epoch
        return MicroBatch(epoch, self._batches[offset])

    def num_batches(self, bucket: Bucket) -> int:
        """Return the micro-batches that ``bucket`` has per epoch."""
        return -(-len(self.members[bucket]) // self.batch_sizes[bucket])

    def _plan(self, epoch: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for bucket, members in self.members.items():
            size = self.batch_sizes[bucket]
            order = range(len(members))
            if self._shuffle:
                order = keyed_permutation(
                    len(members), self._seed, "bucket_order", str(bucket), epoch
                )
            drawn = [members[index] for index in order]
            batches.extend(drawn[start : start + size] for start in range(0, len(drawn), size))
        if not self._shuffle:
            return batches
        order = keyed_permutation(len(batches), self._seed, "batch_order", epoch=epoch)
        return [batches[index] for index in order]


def select_rows(rows: Sequence[SampleRow], cfg: DataConfig, folder: str) -> list[SampleRow]:
    """Return the rows that ``data.train_anchors`` and ``data.train_durations`` select.

    Raises:
        ValueError: Nothing is selected; the message lists what the store has.
    """
    selected = [
        row
        for row in rows
        if (not cfg.train_anchors or row.anchor in cfg.train_anchors)
        and (not cfg.train_durations or row.bucket.frames in cfg.train_durations)
    ]
    if not selected:
        have = Counter((row.anchor, row.bucket) for row in rows)
        names = [
            f"anchor {anchor}: {bucket} ({count})"
            for (anchor, bucket), count in sorted(have.items())
        ]
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise ValueError(
            f"no usable sample: data.train_anchors={cfg.train_anchors} and "
            f"data.train_durations={cfg.train_durations} select none of the {len(rows)} samples in "
            f"{folder}; it has {shown or 'no bucket at all'}. Change the selection, or precompute "
            "with such data.anchors and data.durations"
        )
    return selected


def _fingerprint(
    rows: Sequence[SampleRow], batch_sizes: dict[Bucket, int], cfg: DataConfig, seed: int
) -> str:
    """Name what the stream depends on as ``samples=... batches=... seed=...``."""
    samples = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.sample_id):
        samples.update(f"{row.sample_id}\0{row.latent_key}\0{row.text_key}\n".encode())
    sizes = ",".join(f"{bucket}:{size}" for bucket, size in batch_sizes.items())
    batches = hashlib.sha256(f"{sizes};{cfg.shuffle}".encode())
    return (
        f"samples={samples.hexdigest()[:12]} batches={batches.hexdigest()[:12]} "
        f"shuffle={cfg.shuffle} seed={seed}"
    )
