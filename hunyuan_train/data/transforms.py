"""Pixel ranges: stored bytes and what the VAE takes."""

import numpy as np
import torch
from torch import Tensor


def to_model_range(clips: list[np.ndarray]) -> Tensor:
    """Stack uint8 clips [F, H, W, 3] into float32 [B, 3, F, H, W] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return stacked.float().div_(127.5).sub_(1.0)
