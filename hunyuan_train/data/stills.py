"""Frames that a model may be given, each encoded alone, as the image that a user has.

The VAE normalises over all frames of a clip, so a frame of a clip has other latents than the same
frame by itself. Only the latter can be made from a picture, so training uses these too.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[Sequence[np.ndarray]], tuple[Tensor, Tensor]]
"""Mean and std [B, C, T, h, w] of clips uint8 [F, H, W, 3] of one shape."""

_PLACES = {"first": 0, "last": -1}


def num_stills(names: Sequence[str], frames: int) -> int:
    """Return how many frames of a clip are encoded alone: none of a picture."""
    return len(names) if frames > 1 else 0


def encode_stills(encode: Encode, clips: Sequence[np.ndarray], names: Sequence[str]) -> Tensor:
    """Encode the named frames of clips of one shape, each alone.

    Args:
        encode: The VAE.
        clips: B clips, uint8 [F, H, W, 3], F > 1.
        names: K of ``data.condition_frames``.

    Returns:
        [B, 2, C, K, h, w] float32: unscaled posterior mean, then standard deviation.
    """
    images = [clip[_PLACES[name]][None] for name in names for clip in clips]
    moments = torch.stack(encode(images), dim=1)  # [K * B, 2, C, 1, h, w]
    return torch.cat(moments.chunk(len(names)), dim=3)
