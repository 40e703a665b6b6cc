"""Which latent frames a sample is given, beside its caption, and how they enter the model.

| task | given | |
|---|---|---|
| text | nothing | text to video |
| first | the first latent frame | image to video |
| first_last | the first and the last | interpolation |

A given frame holds the latents of its picture encoded alone (``data.stills``).

Source: HunyuanVideo (arXiv 2412.03603) for ``concat``, the released image-to-video weights for
``token_replace``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hunyuan_train.models.hunyuan.config import ImageCondition
from hunyuan_train.objectives.config import FlowMatchingConfig, Task
from hunyuan_train.runtime.seed import keyed_uniform

_PLACES = {"first": 0, "last": -1}


def draw_tasks(
    cfg: FlowMatchingConfig,
    seed: int,
    sample_ids: Sequence[str | int],
    epochs: Sequence[int],
    frames: int,
) -> list[Task]:
    """Draw what each sample is trained to do, keyed by (seed, sample, epoch).

    Args:
        cfg: the share of each task.
        seed: of the run.
        sample_ids: B ids.
        epochs: B epochs.
        frames: latent frames of each of these samples. Pictures are always text, and clips of two
            latent frames take ``first`` for ``first_last``, which would leave them none to learn.
    """
    wanted = cfg.wanted_tasks
    if frames == 1 or wanted == [Task.text]:
        return [Task.text] * len(sample_ids)
    weights = [cfg.tasks[task] for task in wanted]
    tasks = []
    for sample_id, epoch in zip(sample_ids, epochs, strict=True):
        left = keyed_uniform(seed, "task", sample_id, epoch) * sum(weights)
        place = 0
        while place < len(wanted) - 1 and left >= weights[place]:
            left -= weights[place]
            place += 1
        task = wanted[place]
        tasks.append(Task.first if task is Task.first_last and frames == 2 else task)
    return tasks


def frame_mask(tasks: Sequence[Task], frames: int) -> Tensor:
    """Return [B, T] bool on the CPU, True for the latent frames that each task gives."""
    mask = torch.zeros(len(tasks), frames, dtype=torch.bool)
    for row, task in enumerate(tasks):
        for name in task.frames:
            mask[row, _PLACES[name]] = True
    return mask


def place_frames(pictures: Tensor, names: Sequence[str], frames: int) -> Tensor:
    """Put pictures at their places in a video.

    Args:
        pictures: [B, C, K, h, w] scaled latents.
        names: which frames the K are.
        frames: latent frames T of the video.

    Returns:
        [B, C, T, h, w], 0 in all other frames.
    """
    batch, channels, _, *area = pictures.shape
    placed = pictures.new_zeros(batch, channels, frames, *area)
    for column, name in enumerate(names):
        placed[:, :, _PLACES[name]] = pictures[:, :, column]
    return placed


def give_frames(form: ImageCondition, noisy: Tensor, clean: Tensor, given: Tensor) -> Tensor:
    """Return what the model takes for its latents.

    Args:
        form: how given frames enter the model.
        noisy: [B, C, T, h, w].
        clean: same shape, the latents of given frames.
        given: [B, T] bool, which frames these are.

    Returns:
        ``token_replace``: [B, C, T, h, w], noisy but for given frames. ``concat``: [B, 2 C + 1, T,
        h, w], the noisy latents, the given ones (0 in other frames), and the mask.
    """
    assert form is not ImageCondition.none, "this model takes no frames"
    mask = given.to(noisy.device)[:, None, :, None, None]
    if form is ImageCondition.token_replace:
        return torch.where(mask, clean, noisy)
    shown = torch.where(mask, clean, torch.zeros_like(clean))
    return torch.cat([noisy, shown, mask.to(noisy.dtype).expand_as(noisy[:, :1])], dim=1)
