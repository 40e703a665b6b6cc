"""Shape of the discriminator that a VAE is trained against."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class DiscriminatorConfig:
    """A 3-D PatchGAN; the report names no sizes, the defaults are those of the image original."""

    base_channels: int = 64
    """Channels after the first convolution; they double with every further halving, up to 8x."""

    layers: int = 3
    """Convolutions that halve frames, height and width. With 3 a logit judges a patch of 54 px."""

    norm_groups: int = 8
    """Groups of every GroupNorm; 0 leaves the norms out, so that a logit depends on its
    patch alone and clips may be cut over ranks."""

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible shape."""
        for name in ("base_channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"vae_loss.discriminator.{name}={getattr(self, name)} must be at least 1"
                )
        if self.norm_groups < 0:
            raise ValueError(
                f"vae_loss.discriminator.norm_groups={self.norm_groups} must not be negative"
            )
        if self.norm_groups and self.base_channels % self.norm_groups:
            raise ValueError(
                f"vae_loss.discriminator.norm_groups={self.norm_groups} must divide "
                f"vae_loss.discriminator.base_channels={self.base_channels}"
            )

    @property
    def widths(self) -> list[int]:
        """Return the channels after each halving convolution."""
        return [self.base_channels * min(2**layer, 8) for layer in range(self.layers)]
