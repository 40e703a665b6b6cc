"""Shape of a causal 3-D VAE and how it cuts large videos into tiles."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

TEMPORAL_RATIO = 4
"""Pixel frames per latent frame, the first frame aside: 4n+1 frames become n+1 latent frames."""

VAE_884 = "vae_884"
"""HunyuanVideo's VAE."""

VAE_HY15 = "vae_hy15"
"""HunyuanVideo-1.5's VAE."""


class VaeKind(NamedTuple):
    """What the architecture fixes."""

    spatial_ratio: int
    """Pixels per latent position along height and along width."""

    stages: int
    """Resolutions the encoder walks through, each half of the one before."""


KINDS = {VAE_884: VaeKind(8, 4), VAE_HY15: VaeKind(16, 5)}


@dataclass(kw_only=True, slots=True)
class VaeConfig:
    """A causal autoencoder; the defaults are the released HunyuanVideo VAE."""

    kind: str = VAE_884
    """Architecture: "vae_884" (4x in time, 8x8 in space, norms over the whole clip) or "vae_hy15"
    (4x in time, 16x16 in space, strictly causal)."""

    in_channels: int = 3
    """Colour channels the encoder reads."""

    out_channels: int = 3
    """Colour channels the decoder writes."""

    latent_channels: int = 16
    """Channels of a latent; the encoder predicts a mean and a log-variance for each."""

    block_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Channels at full, 1/2, 1/4, 1/8 and, for vae_hy15, 1/16 resolution."""

    layers_per_block: int = 2
    """Residual blocks per encoder stage; a decoder stage has one more."""

    norm_groups: int = 32
    """Groups of every GroupNorm; divides each of block_channels. vae_hy15 has none."""

    mid_attention: bool = True
    """Whether the middle has its block-causal attention layer; always true for vae_hy15."""

    scaling_factor: float = 0.476986
    """Multiplies latents before diffusion so that their standard deviation is near 1."""

    tile_spatial: bool = True
    """Whether videos wider or higher than tile_size_px are processed in overlapping tiles."""

    tile_temporal: bool = True
    """Whether videos longer than tile_frames are processed in overlapping tiles; false for
    vae_hy15, whose latents depend on the past only."""

    tile_size_px: int = 256
    """Side of a spatial tile in pixels."""

    tile_frames: int = 64
    """Length of a temporal tile in pixel frames, not counting the frame it shares with the past."""

    tile_overlap: float = 0.25
    """Share of a tile that overlaps the next one and is blended into it."""

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible shape or a tile that misses the latent grid."""
        if self.kind not in KINDS:
            raise ValueError(f"vae.kind={self.kind!r} is unknown; choose from {', '.join(KINDS)}")
        stages = KINDS[self.kind].stages
        if len(self.block_channels) != stages:
            sizes = ", ".join(["full", *(f"1/{2**i}" for i in range(1, stages))])
            raise ValueError(
                f"vae.block_channels={list(self.block_channels)} needs {stages} entries, "
                f"one per resolution ({sizes})"
            )
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae.{name}={getattr(self, name)} must be at least 1")
        if self.kind == VAE_HY15:
            self._check_hy15()
        elif self.norm_groups < 1 or any(w % self.norm_groups for w in self.block_channels):
            raise ValueError(
                f"vae.norm_groups={self.norm_groups} must divide every entry of "
                f"vae.block_channels={list(self.block_channels)}"
            )
        if self.scaling_factor <= 0:
            raise ValueError(f"vae.scaling_factor={self.scaling_factor} must be positive")
        self._check_tiles()

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent position along height and along width."""
        return KINDS[self.kind].spatial_ratio

    @property
    def temporal_ratio(self) -> int:
        """Pixel frames per latent frame, the first frame aside."""
        return TEMPORAL_RATIO

    @property
    def tile_stride_px(self) -> int:
        """Distance between neighbouring spatial tiles in pixels."""
        return round(self.tile_size_px * (1 - self.tile_overlap))

    @property
    def tile_stride_frames(self) -> int:
        """Distance between neighbouring temporal tiles in pixel frames."""
        return round(self.tile_frames * (1 - self.tile_overlap))

    def cuts(self, frames: int, height: int, width: int) -> bool:
        """Return whether a video of so many frames and pixels is processed in several tiles."""
        wide = self.tile_spatial and max(height, width) > self.tile_size_px
        return wide or (self.tile_temporal and frames > self.tile_frames)

    def _check_hy15(self) -> None:
        """Check the widths that its packing of pixels into channels can take."""
        for name, only in (("mid_attention", True), ("tile_temporal", False)):
            if getattr(self, name) is not only:
                raise ValueError(
                    f"vae.{name}={getattr(self, name)} does not exist for vae.kind={VAE_HY15}; "
                    f"set it to {only}".replace("True", "true").replace("False", "false")
                )
        widths = list(self.block_channels)
        for stage, (wide, narrow) in enumerate(pairwise(widths)):
            factor = 8 if stage >= 2 else 4
            if narrow % factor or 4 * wide % narrow:
                raise ValueError(
                    f"vae.block_channels={widths}: entry {stage + 1} must be a multiple of "
                    f"{factor} and divide 4 times entry {stage}"
                )
        if widths[-1] % (2 * self.latent_channels):
            raise ValueError(
                f"vae.latent_channels={self.latent_channels}: twice that must divide the last "
                f"entry of vae.block_channels={widths}"
            )

    def _check_tiles(self) -> None:
        if not 0 <= self.tile_overlap < 1:
            raise ValueError(f"vae.tile_overlap={self.tile_overlap} must be in [0, 1)")
        for name, stride, ratio in (
            ("tile_size_px", self.tile_stride_px, self.spatial_ratio),
            ("tile_frames", self.tile_stride_frames, self.temporal_ratio),
        ):
            size = getattr(self, name)
            if size < ratio or stride < ratio or size % ratio or stride % ratio:
                raise ValueError(
                    f"vae.{name}={size} with vae.tile_overlap={self.tile_overlap} gives a stride "
                    f"of {stride}; tile and stride must both be positive multiples of {ratio}"
                )
