"""What the model is told about a sample during training: caption, no caption, guidance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.objectives.flow_matching import TIME_SCALE
from hunyuan_train.runtime.seed import keyed_uniform


def text_drop_mask(
    seed: int, sample_ids: Sequence[str | int], epochs: Sequence[int], probability: float
) -> Tensor:
    """Choose which samples train on the empty caption.

    Returns:
        [B] bool on the CPU, True = drop; keyed by (seed, sample, epoch).
    """
    draws = [
        keyed_uniform(seed, "text_drop", sample_id, epoch)
        for sample_id, epoch in zip(sample_ids, epochs, strict=True)
    ]
    return torch.tensor([draw < probability for draw in draws], dtype=torch.bool)


def apply_text_drop(
    drop: Tensor,
    text: Tensor,
    text_mask: Tensor,
    pooled: Tensor,
    empty_text: Tensor,
    empty_mask: Tensor,
    empty_pooled: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the captions marked in `drop` by the empty caption.

    The empty caption still passes through the prompt template, so it has tokens of its own; zeros
    in its place would be a caption the sampler never sends.

    Args:
        drop: [B] bool.
        text: [B, L, D] token states.
        text_mask: [B, L] bool.
        pooled: [B, P].
        empty_text: [L, D] of the empty caption.
        empty_mask: [L] bool.
        empty_pooled: [P].

    Returns:
        text, text_mask and pooled, same shapes.
    """
    return (
        torch.where(drop[:, None, None], empty_text[None], text),
        torch.where(drop[:, None], empty_mask[None], text_mask),
        torch.where(drop[:, None], empty_pooled[None], pooled),
    )


def check_text_mask(text_mask: Tensor, sample_ids: Sequence[str | int]) -> None:
    """Raise ValueError for captions without a token or with padding on the left.

    The text refiner averages over the valid tokens, so none of them means 0 / 0. A caption padded
    on the left gives wrong output without any error. Call it on the CPU, before the batch moves.

    Args:
        text_mask: [B, L] bool.
        sample_ids: B names for the message.
    """
    lengths = text_mask.sum(dim=1)
    expected = torch.arange(text_mask.shape[1], device=text_mask.device)[None] < lengths[:, None]
    for sample_id, length, fits in zip(
        sample_ids, lengths.tolist(), (text_mask == expected).all(dim=1).tolist(), strict=True
    ):
        if length == 0:
            raise ValueError(
                f"sample {sample_id} has an empty caption mask; even an empty caption has one "
                f"token, so encode its text again with `hunyuan-train precompute`"
            )
        if not fits:
            raise ValueError(
                f"sample {sample_id} has a caption mask that is not right-padded; encode its text "
                f"again with `hunyuan-train precompute`"
            )


def guidance_input(scale: float, batch_size: int, device: torch.device | str) -> Tensor:
    """Return the guidance input of the model, [B] float32 = scale * 1000.

    The released pipelines multiply in bfloat16, which makes 6016 of 6.0 (and 7008 of 7.0); pass
    6.016 to give weights trained there what they expect.
    """
    return torch.full((batch_size,), scale * TIME_SCALE, dtype=torch.float32, device=device)


def keyed_scales(
    cfg: FlowMatchingConfig, seed: int, sample_ids: Sequence[str | int], epochs: Sequence[int]
) -> Tensor:
    """Draw the guidance scale w of each sample of a distillation, uniform in its range.

    Keyed by (seed, sample, epoch), so a sample has the same scale on any rank.

    Returns:
        [B] float32 on the CPU.
    """
    width = cfg.guidance_max - cfg.guidance_min
    draws = [
        cfg.guidance_min + width * keyed_uniform(seed, "guidance", sample_id, epoch)
        for sample_id, epoch in zip(sample_ids, epochs, strict=True)
    ]
    return torch.tensor(draws, dtype=torch.float32)
