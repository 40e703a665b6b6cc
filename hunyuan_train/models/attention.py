"""Attention over all keys, and the seam where context parallelism replaces it."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from hunyuan_train.models.shapes import Heads, JointTokens, KeyMask


class AttentionCore(Protocol):
    """What a block calls as ``self.core``: heads in, merged heads out.

    A replacement (ring, Ulysses) must accept any sequence order, because every key is visible to
    every query and the position is already inside q and k.
    """

    def __call__(self, q: Heads, k: Heads, v: Heads, key_mask: KeyMask | None) -> JointTokens:
        """Attend; ``key_mask`` is True for keys that exist, None when all of them do."""
        ...


def attention(q: Heads, k: Heads, v: Heads, key_mask: KeyMask | None = None) -> JointTokens:
    """Softmax attention with scale 1/sqrt(E), without dropout.

    Args:
        q: queries [B, S, A, E].
        k: keys, same shape.
        v: values, same shape.
        key_mask: [B, S], True for keys that exist; None when all do, which keeps the flash kernels
            eligible (they take no mask). Rows of padding queries hold numbers nobody reads.

    Returns:
        [B, S, A*E], heads merged head-major.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, S]
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(2)


class SdpaCore(nn.Module):
    """The default core: torch's own attention, flash or memory-efficient where it applies."""

    def forward(self, q: Heads, k: Heads, v: Heads, key_mask: KeyMask | None) -> JointTokens:
        """Attend on this device; see ``attention``."""
        return attention(q, k, v, key_mask)


def joint_key_mask(text_mask: Tensor | None, img_tokens: int) -> Tensor | None:
    """Return the key mask [B, N+L] of image tokens (all real) followed by text tokens.

    None in, None out: a batch without padding needs no mask at all.
    """
    if text_mask is None:
        return None
    real = torch.ones(text_mask.shape[0], img_tokens, dtype=torch.bool, device=text_mask.device)
    return torch.cat([real, text_mask], dim=1)
