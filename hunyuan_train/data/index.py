"""The latent store as training reads it: an index of samples over memory-mapped tensor files."""

import json
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.parts import PARTS

META = "meta.json"
FORMAT = 1
_OPEN_SHARDS = 64
_FIX = "run `hunyuan-train precompute` again"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """One training sample: a bucket of one source, where its tensors are, and how it was made."""

    sample_id: str
    """``<source>@<anchor>:<bucket>``; keys all randomness of the sample."""
    source: str
    """File relative to the source folder."""
    bucket: Bucket
    anchor: int
    caption: str
    media: str
    """``image`` for one frame, else ``video``."""
    shard: str
    latent_key: str
    text_shard: str
    text_key: str
    text_tokens: int
    fps: float
    """Frames per second of the sample; 0 for images."""
    scale: float
    """Resize factor per side; above 1 the source was enlarged."""
    crop_loss: float
    """Share of the resized picture that the centre crop removed."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as one index line."""
        return {**asdict(self), "bucket": str(self.bucket)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Read one index line."""
        return cls(**{**row, "bucket": Bucket.parse(row["bucket"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreMeta:
    """What a store was made with."""

    format: int
    index: str
    """File name of the index."""
    latent_channels: int
    text_length: int
    text_dim: int
    pooled_dim: int
    vae_fingerprint: str
    scaling_factor: float
    """What the unscaled latents are multiplied with before the diffusion model sees them."""
    text_fingerprint: str
    config_hash: str
    """Hash of every setting that changes the stored numbers."""
    empty_texts: dict[str, dict[str, Any]]
    """Features of the empty caption, by media: ``{"shard", "key", "tokens"}``."""


class LatentStore:
    """Rows and tensors of a precomputed data set; safe to use from several threads.

    Args:
        folder: The store.
        meta: Its ``meta.json``.
        rows: Its index.
    """

    def __init__(self, folder: Path, meta: StoreMeta, rows: list[SampleRow]) -> None:
        self.folder = folder
        self.meta = meta
        self.rows = rows
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, Any] = OrderedDict()
        used = {row.shard for row in rows} | {row.text_shard for row in rows}
        self.num_bytes = sum(self._shard_path(name).stat().st_size for name in used)
        self._cache: dict[str, Tensor] | None = None
        self._empty: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the store in ``folder``.

        Raises:
            ValueError: There is no store, or it is incomplete or of another format; the message
                names the file and the fix.
        """
        path = Path(folder)
        if not str(folder):
            raise ValueError("data.latents is empty; set it to the folder that precompute wrote")
        try:
            raw = json.loads((path / META).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{path / META} does not exist: no latent store there; {_FIX}"
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path / META} is not JSON ({error}); {_FIX}") from error
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path / META} has store format {found}, this is {FORMAT}; {_FIX}")
        differing = {field.name for field in fields(StoreMeta)} ^ set(raw)
        if differing:
            raise ValueError(
                f"{path / META} comes from another version (field {min(differing)}); {_FIX}"
            )
        meta = StoreMeta(**raw)
        try:
            lines = (path / meta.index).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise ValueError(f"{path / meta.index} is missing from the store; {_FIX}") from error
        rows = [SampleRow.from_json(json.loads(line)) for line in lines]
        try:
            return cls(path, meta, rows)
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing from the store; {_FIX}") from error

    def enable_cache(self, max_gib: float) -> None:
        """Keep tensors in memory after the first read if all shards fit in ``max_gib``."""
        with self._lock:
            self._cache = {} if self.num_bytes <= max_gib * 2**30 else None

    def load(self, row: SampleRow) -> dict[str, Tensor]:
        """Read one sample.

        Returns:
            ``mean`` and ``std`` float32 [C, T, h, w] (unscaled latents), ``states`` float32 [L, D]
            (rows beyond the caption are zero), ``mask`` bool [L], ``pooled`` float32 [P].

        Raises:
            ValueError: A shard is missing or damaged.
        """
        mean, std = self.latents(row)
        states, pooled = self.text(row)
        return {"mean": mean, "std": std, **self._padded(states, pooled)}

    def empty(self, media: str) -> dict[str, Tensor]:
        """Read the features of the empty caption: ``states``, ``mask``, ``pooled`` as in load.

        Every call returns the same tensors; they are not to be changed in place.
        """
        if media not in self._empty:
            entry = self.meta.empty_texts[media]
            self._empty[media] = self._padded(*self._text(entry["shard"], entry["key"]))
        return self._empty[media]

    def latents(self, row: SampleRow) -> tuple[Tensor, Tensor]:
        """Read posterior mean and std, float32 [C, T, h, w]; not to be changed in place."""
        return (
            self._tensor(row.shard, f"{row.latent_key}/mean"),
            self._tensor(row.shard, f"{row.latent_key}/std"),
        )

    def text(self, row: SampleRow) -> tuple[Tensor, Tensor]:
        """Read the unpadded states, float32 [tokens, D], and pooled [P]; not to be changed."""
        return self._text(row.text_shard, row.text_key)

    def _text(self, shard: str, key: str) -> tuple[Tensor, Tensor]:
        return self._tensor(shard, f"{key}/states"), self._tensor(shard, f"{key}/pooled")

    def _padded(self, states: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        padded = torch.zeros(self.meta.text_length, self.meta.text_dim)
        padded[: len(states)] = states
        mask = torch.arange(self.meta.text_length) < len(states)
        return {"states": padded, "mask": mask, "pooled": pooled.clone()}

    def _tensor(self, shard: str, name: str) -> Tensor:
        """Return one tensor as float32."""
        with self._lock:
            if self._cache is not None and name in self._cache:
                return self._cache[name].float()
            try:
                stored = self._open_shard(shard).get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{self._shard_path(shard)} is missing or damaged ({error}); "
                    f"delete parts/{shard}.* and {_FIX}"
                ) from error
            if self._cache is not None:
                self._cache[name] = stored
            return stored.float()

    def _open_shard(self, shard: str) -> Any:
        if shard not in self._shards:
            self._shards[shard] = safe_open(self._shard_path(shard), framework="pt")
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def _shard_path(self, shard: str) -> Path:
        return self.folder / PARTS / f"{shard}.safetensors"
