"""What is drawn from: cells of equal samples, and the share of each in the samples drawn."""

from dataclasses import dataclass

from hunyuan_train.data.buckets import Bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Rows of one store with equal concept, bucket, anchor and repeat; of one cost."""

    name: str
    """``source/concept/17x256x256@256x1``: source, concept, bucket, anchor, repeat."""
    store: int
    """Number of the store in the list that ``cells_of`` was given."""
    first: int
    """Row of the store's index where the cell begins."""
    count: int
    """Rows."""
    repeat: int
    """Times that each row is drawn in an epoch."""
    bucket: Bucket
    anchor: int
    concept: str
    source: str
    """Key of ``data.sources``."""

    @property
    def media(self) -> str:
        """``image`` for one frame, else ``video``."""
        return self.bucket.media
