"""The value a text encoder returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Images = Sequence[np.ndarray | None]
"""One picture per caption, uint8 [H, W, 3], or None."""
BLACK = np.zeros((64, 64, 3), np.uint8)
"""What an encoder that sees pictures is shown where a video is to be made from nothing."""


def shown_beside(media: str, caption: str, picture: np.ndarray | None) -> np.ndarray | None:
    """Return the picture that an encoder sees beside a caption.

    "No text" for a video stands for "no picture" as well: as published, a black one.
    """
    return BLACK if picture is None and media == "video" and not caption else picture


@dataclass(kw_only=True, slots=True)
class TextFeatures:
    """Text conditioning of B captions, right-padded to one length.

    Rows of `states` where `mask` is False are zero, so that features which were stored without
    their padding equal freshly encoded ones bit for bit.
    """

    states: Tensor
    """[B, L, D] float32 token states."""
    mask: Tensor
    """[B, L] bool, True for real tokens; every row starts with at least one."""
    pooled: Tensor
    """[B, P] float32, one vector for the whole caption."""

    def __len__(self) -> int:
        """Return the number of captions."""
        return self.states.shape[0]

    def to(self, device: torch.device | str) -> "TextFeatures":
        """Return the same features on `device`."""
        return TextFeatures(
            states=self.states.to(device),
            mask=self.mask.to(device),
            pooled=self.pooled.to(device),
        )

    def select(self, rows: Sequence[int]) -> "TextFeatures":
        """Return the captions at `rows`, in that order; a row may repeat."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.states.device)
        return TextFeatures(
            states=self.states[index], mask=self.mask[index], pooled=self.pooled[index]
        )


def refuse_images(images: Images | None, kind: str) -> None:
    """Raise ValueError if an encoder that sees no pictures is given one."""
    if images is not None and any(image is not None for image in images):
        raise ValueError(f"text.kind={kind} sees no pictures; set text.kind=llava")


def concatenate(parts: Sequence[TextFeatures]) -> TextFeatures:
    """Stack features of equal length and width along the batch."""
    return TextFeatures(
        states=torch.cat([part.states for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        pooled=torch.cat([part.pooled for part in parts]),
    )
