"""The text encoder interface and the one place that builds an encoder from config."""

from typing import Protocol, runtime_checkable

import torch

from hunyuan_train.encoders.config import TextEncoderConfig, TextEncoderKind
from hunyuan_train.encoders.features import BLACK, Images, TextFeatures, concatenate, shown_beside

__all__ = [
    "BLACK",
    "Images",
    "TextEncoder",
    "TextFeatures",
    "build_text_encoder",
    "concatenate",
    "shown_beside",
]


@runtime_checkable
class TextEncoder(Protocol):
    """Turns captions into the conditioning of the diffusion model."""

    text_length: int
    """Tokens per caption (L of the features)."""
    text_dim: int
    """Width of a token state (D)."""
    pooled_dim: int
    """Width of the pooled vector (P)."""
    sees_images: bool
    """Whether the features of a video depend on its first frame."""
    fingerprint: str
    """Changes whenever the features of some caption may change; cached features carry it."""

    def encode(self, captions: list[str], media: str, images: Images | None = None) -> TextFeatures:
        """Encode captions of one medium.

        Args:
            captions: B captions; an empty one is allowed and stands for "no text".
            media: "image" or "video"; the released encoder words its prompt accordingly.
            images: First frame of each video, uint8 [H, W, 3], None for one without; of an encoder
                that `sees_images`.

        Returns:
            Features on the encoder's device.

        Raises:
            ValueError: `media` is neither "image" nor "video", or there are images where the
                encoder sees none.
        """
        ...


def build_text_encoder(cfg: TextEncoderConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """Build the encoder that `cfg` names, ready to use on `device`.

    Raises:
        ValueError: a folder or file the encoder needs is missing or is of another model.
    """
    if cfg.kind is TextEncoderKind.builtin:
        from hunyuan_train.encoders.builtin import BuiltinTextEncoder

        return BuiltinTextEncoder(cfg, device)
    # Imported here because transformers takes seconds to load and the built-in encoder needs none.
    if cfg.kind is TextEncoderKind.llava:
        from hunyuan_train.encoders.llava import LlavaTextEncoder

        return LlavaTextEncoder(cfg, device)
    from hunyuan_train.encoders.hunyuan import HunyuanTextEncoder

    return HunyuanTextEncoder(cfg, device)
