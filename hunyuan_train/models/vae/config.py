"""Shape of the causal 3-D VAE and how it cuts large videos into tiles."""

from dataclasses import dataclass, field

TEMPORAL_RATIO = 4
"""Pixel frames per latent frame, the first frame aside: 4n+1 frames become n+1 latent frames."""

SPATIAL_RATIO = 8
"""Pixels per latent position along height and along width."""

NUM_STAGES = 4
"""Resolutions the encoder walks through: full, 1/2, 1/4 and 1/8."""


@dataclass(kw_only=True, slots=True)
class VaeConfig:
    """The 4x8x8 autoencoder; the defaults are the released HunyuanVideo VAE."""

    kind: str = "vae_884"
    """Architecture: only "vae_884" (4x in time, 8x8 in space) exists."""

    in_channels: int = 3
    """Colour channels the encoder reads."""

    out_channels: int = 3
    """Colour channels the decoder writes."""

    latent_channels: int = 16
    """Channels of a latent; the encoder predicts a mean and a log-variance for each."""

    block_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Channels at full, 1/2, 1/4 and 1/8 resolution."""

    layers_per_block: int = 2
    """Residual blocks per encoder stage; a decoder stage has one more."""

    norm_groups: int = 32
    """Groups of every GroupNorm; divides each of block_channels."""

    mid_attention: bool = True
    """Whether the 1/8-resolution middle has its block-causal attention layer."""

    scaling_factor: float = 0.476986
    """Multiplies latents before diffusion so that their standard deviation is near 1."""

    tile_spatial: bool = True
    """Whether videos wider or higher than tile_size_px are processed in overlapping tiles."""

    tile_temporal: bool = True
    """Whether videos longer than tile_frames are processed in overlapping tiles."""

    tile_size_px: int = 256
    """Side of a spatial tile in pixels."""

    tile_frames: int = 64
    """Length of a temporal tile in pixel frames, not counting the frame it shares with the past."""

    tile_overlap: float = 0.25
    """Share of a tile that overlaps the next one and is blended into it."""

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible shape or a tile that misses the latent grid."""
        if self.kind != "vae_884":
            raise ValueError(f'vae.kind={self.kind!r} is unknown; the only kind is "vae_884"')
        if len(self.block_channels) != NUM_STAGES:
            raise ValueError(
                f"vae.block_channels={list(self.block_channels)} needs {NUM_STAGES} entries, "
                "one per resolution (full, 1/2, 1/4, 1/8)"
            )
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae.{name}={getattr(self, name)} must be at least 1")
        if self.norm_groups < 1 or any(width % self.norm_groups for width in self.block_channels):
            raise ValueError(
                f"vae.norm_groups={self.norm_groups} must divide every entry of "
                f"vae.block_channels={list(self.block_channels)}"
            )
        if self.scaling_factor <= 0:
            raise ValueError(f"vae.scaling_factor={self.scaling_factor} must be positive")
        self._check_tiles()

    @property
    def tile_stride_px(self) -> int:
        """Distance between neighbouring spatial tiles in pixels."""
        return round(self.tile_size_px * (1 - self.tile_overlap))

    @property
    def tile_stride_frames(self) -> int:
        """Distance between neighbouring temporal tiles in pixel frames."""
        return round(self.tile_frames * (1 - self.tile_overlap))

    def _check_tiles(self) -> None:
        if not 0 <= self.tile_overlap < 1:
            raise ValueError(f"vae.tile_overlap={self.tile_overlap} must be in [0, 1)")
        for name, stride, ratio in (
            ("tile_size_px", self.tile_stride_px, SPATIAL_RATIO),
            ("tile_frames", self.tile_stride_frames, TEMPORAL_RATIO),
        ):
            size = getattr(self, name)
            if size < ratio or stride < ratio or size % ratio or stride % ratio:
                raise ValueError(
                    f"vae.{name}={size} with vae.tile_overlap={self.tile_overlap} gives a stride "
                    f"of {stride}; tile and stride must both be positive multiples of {ratio}"
                )
