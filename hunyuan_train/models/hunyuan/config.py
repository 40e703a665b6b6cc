"""Config section of the HunyuanVideo diffusion transformer."""

from dataclasses import dataclass, field
from enum import StrEnum


class ImageCondition(StrEnum):
    """How given frames enter the model; both forms are published, their weights do not mix."""

    none = "none"
    """There are none: text to video."""
    concat = "concat"
    """2C + 1 input channels: noisy latents, the given frames' latents, and a mask of them."""
    token_replace = "token_replace"
    """Given frames replace noisy ones, and their tokens are modulated as at time 0."""


@dataclass(kw_only=True, slots=True)
class HunyuanConfig:
    """Sizes of the transformer; the defaults are the released 13B model."""

    kind: str = "hunyuan"
    """Which model the registry builds."""
    hidden_size: int = 3072
    """Width D of both token streams."""
    num_heads: int = 24
    """Attention heads; D / num_heads is the head size."""
    num_double_blocks: int = 20
    """Blocks with separate weights for image and text tokens."""
    num_single_blocks: int = 40
    """Blocks with shared weights over the joint sequence."""
    mlp_ratio: float = 4.0
    """Inner width of every MLP over D."""
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Latent frames, rows and columns in one token."""
    in_channels: int = 16
    """Latent channels in."""
    out_channels: int = 16
    """Velocity channels out."""
    rope_axes: list[int] = field(default_factory=lambda: [16, 56, 56])
    """Head channels rotated by frame, row and column; they add up to the head size."""
    rope_theta: float = 256.0
    """Base of the rotary frequencies."""
    text_dim: int = 4096
    """Width of the language model's token states."""
    pooled_dim: int = 768
    """Width of the pooled text vector."""
    refiner_depth: int = 2
    """Blocks of the text token refiner."""
    guidance_embed: bool = False
    """Whether the model takes a guidance scale (the guidance-distilled form)."""

    image_condition: ImageCondition = ImageCondition.none
    """How given frames (image to video) enter: none, concat (in_channels = 2 out_channels + 1) or
    token_replace."""

    def __post_init__(self) -> None:
        """Check sizes against each other.

        Raises:
            ValueError: names the fields, their values and what would fit.
        """
        for name in ("hidden_size", "num_heads", "in_channels", "out_channels", "text_dim",
                     "pooled_dim", "mlp_ratio", "rope_theta"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be positive")
        for name in ("num_double_blocks", "num_single_blocks", "refiner_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must not be negative")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_heads={self.num_heads}; choose a multiple"
            )
        if self.image_condition is ImageCondition.concat and (
            self.in_channels != 2 * self.out_channels + 1
        ):
            raise ValueError(
                f"model.image_condition=concat takes noisy latents, given latents and a mask, so "
                f"model.in_channels={self.in_channels} must be 2 * model.out_channels + 1 = "
                f"{2 * self.out_channels + 1}"
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(
                f"model.patch_size={self.patch_size} must be three positive numbers, "
                "latent frames, rows and columns"
            )
        if self.image_condition is not ImageCondition.none and self.patch_size[0] != 1:
            raise ValueError(
                f"model.image_condition={self.image_condition} needs tokens of one latent frame, "
                f"but model.patch_size={self.patch_size} joins {self.patch_size[0]}; begin it "
                "with 1"
            )
        if (
            len(self.rope_axes) != 3
            or min(self.rope_axes) < 2
            or any(a % 2 for a in self.rope_axes)
        ):
            raise ValueError(
                f"model.rope_axes={self.rope_axes} must be three even positive numbers, "
                "channels for frame, row and column"
            )
        if sum(self.rope_axes) != self.head_dim:
            raise ValueError(
                f"model.rope_axes={self.rope_axes} adds up to {sum(self.rope_axes)}, but "
                f"model.hidden_size={self.hidden_size} over model.num_heads={self.num_heads} makes "
                f"heads of {self.head_dim}; make the axes add up to {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Inner width of every MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patch_volume(self) -> int:
        """Latent positions in one token."""
        frames, rows, columns = self.patch_size
        return frames * rows * columns
