"""A deterministic text encoder without weights, for the demo and the tests.

Every word has a fixed random vector that depends on the word alone. A model that has learned
"red" and "square" from other captions therefore receives the same two vectors in "red square".
"""

import hashlib
import logging
import math
import re

import torch
from torch import Tensor

from hunyuan_train.encoders.config import TextEncoderConfig
from hunyuan_train.encoders.features import Images, TextFeatures, refuse_images
from hunyuan_train.encoders.templates import check_media
from hunyuan_train.runtime.seed import keyed_normal

logger = logging.getLogger(__name__)

_VERSION = "builtin-1"
_EMPTY = "<empty>"
"""Stands for an empty caption; the tokenizer below can never produce it from text."""
_POSITION_SCALE = 0.5
"""Position varies by 0.35 per component, content by 1: order is readable, words dominate."""


class BuiltinTextEncoder:
    """Word vectors plus a position code; the pooled vector is the normalised mean of the words.

    The features do not depend on `media`: the diffusion model sees the number of frames itself.
    """

    sees_images = False

    def __init__(self, cfg: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        """Prepare the position code.

        Args:
            cfg: sizes; folders and dtype are not used.
            device: where the features are returned.
        """
        self.text_length = cfg.max_length
        self.text_dim = cfg.text_dim
        self.pooled_dim = cfg.pooled_dim
        sizes = f"{_VERSION}:{cfg.max_length}:{cfg.text_dim}:{cfg.pooled_dim}"
        self.fingerprint = f"{_VERSION}-{hashlib.sha256(sizes.encode()).hexdigest()[:16]}"
        self._device = torch.device(device)
        self._positions = _position_code(cfg.max_length, cfg.text_dim)
        self._words: dict[tuple[str, int], Tensor] = {}
        self._warned = False

    def encode(self, captions: list[str], media: str, images: Images | None = None) -> TextFeatures:
        """Encode B captions; see `TextEncoder.encode`."""
        check_media(media)
        refuse_images(images, "builtin")
        states = torch.zeros(len(captions), self.text_length, self.text_dim)
        mask = torch.zeros(len(captions), self.text_length, dtype=torch.bool)
        pooled = torch.zeros(len(captions), self.pooled_dim)
        for row, caption in enumerate(captions):
            words = self._tokenize(caption)
            content = torch.stack([self._vector(word, self.text_dim) for word in words])
            states[row, : len(words)] = content + self._positions[: len(words)]
            mask[row, : len(words)] = True
            mean = torch.stack([self._vector(word, self.pooled_dim) for word in words]).mean(0)
            pooled[row] = mean / mean.square().mean().sqrt()
        return TextFeatures(states=states, mask=mask, pooled=pooled).to(self._device)

    def _tokenize(self, caption: str) -> list[str]:
        words = re.findall(r"\w+", caption.lower())
        if len(words) > self.text_length:
            level = logging.DEBUG if self._warned else logging.WARNING
            self._warned = True
            logger.log(
                level,
                "a caption of %d words is cut to text.max_length=%d (later cuts stay silent): %s",
                len(words),
                self.text_length,
                caption,
            )
        return words[: self.text_length] or [_EMPTY]

    def _vector(self, word: str, dim: int) -> Tensor:
        """Return the word's vector, [dim], root mean square 1; random ones are near-orthogonal."""
        key = (word, dim)
        if key not in self._words:
            vector = keyed_normal((dim,), 0, _VERSION, word)
            self._words[key] = vector / vector.square().mean().sqrt()
        return self._words[key]


def _position_code(length: int, dim: int) -> Tensor:
    """Return sinusoids [length, dim] with wavelengths from 2 pi words to four times the length."""
    half = (dim + 1) // 2
    longest = max(4.0 * length / (2 * math.pi), 1.0)
    rate = longest ** -(torch.arange(half) / max(half - 1, 1))
    angle = torch.arange(length)[:, None] * rate[None, :]
    return _POSITION_SCALE * torch.cat([angle.cos(), angle.sin()], dim=1)[:, :dim]
