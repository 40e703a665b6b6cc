"""The ``data`` section of the config."""

from dataclasses import dataclass, field
from enum import StrEnum

from hunyuan_train.data.buckets import Assign, Bucket, BucketTable, check_frames
from hunyuan_train.data.service_config import ServiceConfig


class ClipStart(StrEnum):
    """Where in a long clip the frames of a sample begin."""

    head = "head"
    centre = "centre"


class Integrity(StrEnum):
    """How much of a video must decode without damage."""

    full = "full"
    used = "used"


class Encode(StrEnum):
    """When clips become latents and captions become text features."""

    ahead = "ahead"
    online = "online"
    service = "service"


class Policy(StrEnum):
    """How the work of an update is drawn and shared out."""

    balanced = "balanced"
    random = "random"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One of several latent stores that a run mixes."""

    latents: str = ""
    """Folder or URL of the latent store."""
    weight: float = 0.0
    """Share of the samples drawn, over the sum of all weights; 0 everywhere: by sample counts."""
    epochs: int = 0
    """Passes over this source until it leaves the mixture; 0 has no end."""

    def __post_init__(self) -> None:
        """Reject values that cannot work, naming the field and the fix."""
        _at_least("sources entry weight", self.weight, 0)
        _at_least("sources entry epochs", self.epochs, 0)


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

    condition_frames: list[str] = field(default_factory=list)
    """Frames of each clip that are also encoded alone, for objective.tasks that give them to the
    model: first, last. Naming one makes precompute encode its clips again."""
    storage_dtype: StorageDtype = StorageDtype.float16
    """Stored number format; float16 keeps 3 more bits than bfloat16 and latents need no range."""
    shard_sources: int = 64
    """Source files per shard; a killed precompute process loses the shard it works on, and those
    before and after it if they were not written yet, or begun."""
    encode_pixels: int = 4_259_840
    """Pixels (frames x height x width) that the VAE encodes in one call, at least one clip; the
    default is one tile of the VAE, 65 x 256 x 256."""
    decode_workers: int = 2
    """Threads that decode ahead of the encoder."""

    train_anchors: list[int] = field(default_factory=list)
    """Anchors to train on; empty means all in the store."""
    train_durations: list[int] = field(default_factory=list)
    """Durations in frames to train on; empty means all in the store."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Stores to mix, by name, instead of the one in ``latents``."""
    encode: Encode = Encode.ahead
    """``ahead``: training reads what precompute stored; ``online``: training decodes and encodes
    the clips of ``source``, and keeps only an index in ``latents``; ``service``: encoder processes
    do, ahead of training."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """Encoder processes, with ``encode=service``."""
    media_shares: dict[str, float] = field(default_factory=dict)
    """Shares of ``image`` and ``video`` in the samples drawn; empty: by sample counts."""
    anchor_shares: dict[int, float] = field(default_factory=dict)
    """Shares of the anchors in the samples drawn, like ``{256: 0.5, 512: 0.5}``."""
    concept_shares: dict[str, float] = field(default_factory=dict)
    """Shares of the concepts that the manifest names, in the samples drawn."""
    policy: Policy = Policy.balanced
    """``balanced``: all ranks get work of equal predicted cost, round by round; ``random``: every
    rank draws from a random bucket."""
    planned_ranks: int = 0
    """Data-parallel ranks that rounds of equal work are drawn for; 0 takes those of the first
    start. A run draws the same samples whatever ranks it has, as long as this is the same."""
    global_samples: int = 0
    """Samples of one update over all ranks; 0 leaves it to global_tokens or stage.micro_steps."""
    global_tokens: int = 0
    """Image tokens of one update over all ranks, on average; 0 leaves it to stage.micro_steps."""
    max_tokens: int = 8192
    """Image tokens that fit into one micro-batch; 0 estimates them from the device's memory."""
    max_batch: int = 16
    """Largest micro-batch size of any bucket."""
    batches: dict[str, int] = field(default_factory=dict)
    """Largest micro-batch size of single buckets, like ``{"129x720x1280": 1}``."""
    shuffle: bool = True
    """Draw samples and buckets in a new keyed order every epoch; off keeps the store's order."""
    verify: bool = True
    """Compare what is read with the digests of the index."""
    workers: int = 2
    """Threads that read, or processes that decode, ahead of training."""
    worker_timeout_s: float = 120.0
    """Seconds a worker may take for one sample before it is replaced."""
    prefetch_gib: float = 0.5
    """Memory for samples read ahead, per rank."""
    retries: int = 5
    """Further attempts to read from an object store, each after twice the last wait."""
    local_cache: str = ""
    """Folder for copies of remote indexes; empty uses the system's temporary folder."""
    max_bad_share: float = 0.01
    """Share of unusable samples met in training above which the run stops."""

    caption_variants: int = 1
    """Renderings of a structured caption that precompute stores; training draws one per epoch."""
    field_drop: float = 0.1
    """Probability with which a structured caption's rendering leaves out a field."""
    max_crop_loss: float = 0.5
    """Largest share of the resized picture that a crop may remove; what loses more is listed."""

    def __post_init__(self) -> None:
        """Reject values that cannot work, naming the field and the fix."""
        table = BucketTable(self.anchors, self.durations, self.max_aspect, self.bucket_stride)
        self.anchors, self.durations = list(table.anchors), list(table.durations)
        for frames in self.train_durations:
            check_frames(frames, "data.train_durations entry")
        for name in ("shard_sources", "encode_pixels", "decode_workers", "max_batch", "workers"):
            _at_least(name, getattr(self, name), 1)
        for name in _COUNTS:
            _at_least(name, getattr(self, name), 0)
        for name in ("caption_variants", "worker_timeout_s"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_bad_share", "field_drop", "max_crop_loss"):
            _between(name, getattr(self, name))
        unknown = set(self.condition_frames) - set(FRAME_NAMES)
        if unknown:
            raise ValueError(
                f"data.condition_frames={self.condition_frames} names {min(unknown)!r}; "
                f"choose from {', '.join(FRAME_NAMES)}"
            )
        self.condition_frames = [name for name in FRAME_NAMES if name in self.condition_frames]
        if self.global_samples and self.global_tokens:
            raise ValueError(
                f"data.global_samples={self.global_samples} and data.global_tokens="
                f"{self.global_tokens} both size an update; set one of them to 0"
            )
        self._check_shares()
        _at_least("max_upscale", self.max_upscale, 1)
        _at_least("max_fps", self.max_fps, 1)

    def _check_shares(self) -> None:
        for name in ("media_shares", "anchor_shares", "concept_shares"):
            shares = getattr(self, name)
            if any(share < 0 for share in shares.values()) or (shares and not sum(shares.values())):
                raise ValueError(f"data.{name}={shares} has a negative share or only zeros")
        for bucket, batch in self.batches.items():
            Bucket.parse(bucket)
            _at_least(f"batches[{bucket}]", batch, 1)

    def bucket_table(self) -> BucketTable:
        """Return the buckets that precompute assigns sources to."""
        return BucketTable(self.anchors, self.durations, self.max_aspect, self.bucket_stride)


FRAME_NAMES = ("first", "last")
"""What ``data.condition_frames`` may name, in the order in which they are stored."""
_COUNTS = (
    "max_tokens", "global_samples", "global_tokens", "planned_ranks", "retries", "prefetch_gib",
)  # fmt: skip


def _at_least(name: str, value: float, minimum: float) -> None:
    if value < minimum:
        raise ValueError(f"data.{name}={value} is below {minimum}; set it to {minimum} or more")


def _between(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"data.{name}={value} is a share; set it between 0 and 1")
