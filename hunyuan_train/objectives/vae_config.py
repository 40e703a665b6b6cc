"""The `vae_training` section: what is special about stages that train the VAE."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class VaeTrainingConfig:
    """How clips are cut, when tiles are trained on, and how the latents' scale is measured."""

    crop_px: int = 0
    """Frames are cut at random to at most this height and width, a multiple of the VAE's spatial
    ratio; 0 leaves them whole."""
    max_interval: int = 1
    """The frames of a clip are 1 to this many frames of its source apart, drawn anew in every
    epoch and the same within a clip; the report takes 8."""
    tiling_share: float = 0.0
    """Share of the micro-batches that are encoded and decoded in the tiles of `vae`: the report's
    last phase switches tiles on and off at random, 0.5."""
    tiling_consistency: float = 0.0
    """Weight of the error of what tiles reconstruct against what the whole reconstructs, in
    micro-batches with tiles, beside the error against the recording."""
    scale_samples: int = 64
    """Samples over which the latents' standard deviation is measured at the end of a stage; its
    inverse is the scaling factor."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        if self.crop_px < 0 or self.crop_px % 8:
            raise ValueError(
                f"vae_training.crop_px={self.crop_px} must be a multiple of 8, or 0 for none"
            )
        for name in ("max_interval", "scale_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae_training.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.tiling_share <= 1:
            raise ValueError(
                f"vae_training.tiling_share={self.tiling_share} is a share; set it from 0 to 1"
            )
        if not self.tiling_consistency >= 0:
            raise ValueError(
                f"vae_training.tiling_consistency={self.tiling_consistency} must not be negative"
            )
