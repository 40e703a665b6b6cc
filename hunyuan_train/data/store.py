"""Samples by row number: the protocol that training reads, and the store that precompute writes."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hunyuan_train.data.index import Index

META = "meta.json"


@dataclass(kw_only=True, slots=True)
class Text:
    """Features of one caption."""

    states: Tensor
    """float32 [tokens, D], not padded."""
    pooled: Tensor
    """float32 [P]."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One sample on the CPU; the tensors are the caller's own."""

    mean: Tensor
    """float32 [C, T, h, w], unscaled posterior mean of the latents."""
    std: Tensor
    """float32 [C, T, h, w]."""
    text: Text


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreMeta:
    """What a store was made with."""

    format: int
    index: str
    """Folder name of the index."""
    storage_dtype: str
    """Number format of the stored tensors."""
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
    """The empty caption, by media: ``{"shard", "offset", "nbytes", "digest", "tokens"}``."""


class SampleStore(Protocol):
    """What planner, loader and collate need of a store; safe to use from several threads."""

    name: str
    """Key in data.sources; empty for a single store."""
    meta: StoreMeta
    index: Index

    def load(self, number: int, variant: int) -> Sample:
        """Read row ``number`` with its caption ``variant``, counted from 0.

        Raises:
            SampleError: This sample cannot be used; it says why.
        """
        ...

    def empty(self, media: str) -> Text:
        """Read the features of the empty caption of ``image`` or ``video``; not to be changed."""
        ...
