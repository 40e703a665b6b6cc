"""The ``data`` section of the config."""

from dataclasses import dataclass, field
from enum import StrEnum

from hunyuan_train.data.buckets import Assign, BucketTable, check_frames


class ClipStart(StrEnum):
    """Where in a long clip the frames of a sample begin."""

    head = "head"
    centre = "centre"


class Integrity(StrEnum):
    """How much of a video must decode without damage."""

    full = "full"
    used = "used"


class StorageDtype(StrEnum):
    """Number format of stored latents and text states."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the clips are, how they become bucketed latents, and how those become batches."""

    source: str = ""
    """Folder of clips and images, or a JSONL manifest; precompute reads it."""
    latents: str = ""
    """Folder of the latent store: precompute writes it, training reads it."""

    anchors: list[int] = field(default_factory=lambda: [256])
    """Bucket side lengths in pixels that precompute makes samples for."""
    durations: list[int] = field(default_factory=lambda: [1, 17])
    """Bucket lengths in frames (4n+1) that precompute makes samples for; 1 makes image samples."""
    max_aspect: float = 4.0
    """Largest long side over short side of a bucket."""
    bucket_stride: int = 16
    """Step between bucket sides in pixels, a multiple of 16; 32 gives fewer aspect ratios."""
    assign: Assign = Assign.nearest
    """``nearest``: one sample per source, the largest anchor and longest duration that fit;
    ``every``: one for each anchor and duration that fits."""
    max_upscale: float = 1.0
    """Largest enlargement with which an anchor still fits; the smallest anchor always fits."""
    max_fps: float = 50.0
    """Clips at this rate or above keep every n-th frame, with the smallest n that gets below it."""
    clip_start: ClipStart = ClipStart.head
    """Whether samples start at the first frame or are centred in the clip."""
    integrity: Integrity = Integrity.full
    """``full`` decodes every frame once to find damage; ``used`` stops after the last needed."""

    storage_dtype: StorageDtype = StorageDtype.float16
    """Stored number format; float16 keeps 3 more bits than bfloat16 and latents need no range."""
    shard_sources: int = 64
    """Source files per shard: what a killed precompute process loses at most."""
    encode_pixels: int = 4_259_840
    """Pixels (frames x height x width) that the VAE encodes in one call, at least one clip; the
    default is one tile of the VAE, 65 x 256 x 256."""
    decode_workers: int = 2
    """Threads that decode ahead of the encoder."""

    train_anchors: list[int] = field(default_factory=list)
    """Anchors to train on; empty means all in the store."""
    train_durations: list[int] = field(default_factory=list)
    """Durations in frames to train on; empty means all in the store."""
    max_tokens: int = 8192
    """Image tokens of one micro-batch; a bucket's batch is this over its tokens, at least 1."""
    max_batch: int = 16
    """Largest micro-batch size of any bucket."""
    shuffle: bool = True
    """Draw samples and buckets in a new keyed order every epoch; off keeps the store's order."""
    prefetch_batches: int = 4
    """Micro-batches read ahead in the background."""
    cache_gib: float = 1.0
    """A store of at most this size is kept in memory after the first read."""

    def __post_init__(self) -> None:
        """Reject values that cannot work, naming the field and the fix."""
        table = BucketTable(self.anchors, self.durations, self.max_aspect, self.bucket_stride)
        self.anchors, self.durations = list(table.anchors), list(table.durations)
        for frames in self.train_durations:
            check_frames(frames, "data.train_durations entry")
        for name in ("shard_sources", "encode_pixels", "decode_workers", "max_tokens", "max_batch"):
            _at_least(name, getattr(self, name), 1)
        _at_least("prefetch_batches", self.prefetch_batches, 1)
        _at_least("cache_gib", self.cache_gib, 0)
        _at_least("max_upscale", self.max_upscale, 1)
        _at_least("max_fps", self.max_fps, 1)

    def bucket_table(self) -> BucketTable:
        """Return the buckets that precompute assigns sources to."""
        return BucketTable(self.anchors, self.durations, self.max_aspect, self.bucket_stride)


def _at_least(name: str, value: float, minimum: float) -> None:
    if value < minimum:
        raise ValueError(f"data.{name}={value} is below {minimum}; set it to {minimum} or more")
