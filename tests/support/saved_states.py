"""Small states, and checkpoints of them."""

from pathlib import Path

import torch

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.manager import CheckpointManager

IDENTITY = {"kind": "hunyuan", "hidden_size": 192, "patch_size": [1, 2, 2]}


def tensors_of(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model": {
            "weight": draw(33, 7),
            "transposed": draw(5, 9).t(),
            "half": draw(11).to(torch.bfloat16),
            "strange": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        },
        "ema": {"weight": draw(33, 7), "half": draw(11)},
        "optimizer": {"weight": {"step": torch.tensor(float(seed)), "exp_avg": draw(33, 7)}},
        "counters": {"seen": torch.tensor([2**40 + seed])},
    }


def bits(tensors: dict) -> dict:
    return {
        name: bits(value)
        if isinstance(value, dict)
        else (
            value.dtype,
            tuple(value.shape),
            value.contiguous().view(-1).view(torch.uint8).tolist(),
        )
        for name, value in tensors.items()
    }


def manager_of(folder: Path, **changes) -> CheckpointManager:
    return CheckpointManager(folder / "checkpoints", CheckpointConfig(**changes), IDENTITY)


def step_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def save_two(folder: Path) -> Path:
    """Save checkpoints of steps 10 and 20 in ``folder`` and return it."""
    manager = manager_of(folder)
    assert manager.save(10, tensors_of(10), {"samples": 100})
    assert manager.save(20, tensors_of(20), {"samples": 200})
    return folder
