"""The autoencoder split over ranks against the whole clip in one process."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.model import CausalVae3D, Posterior
from hunyuan_train.parallel import vae_norm
from hunyuan_train.parallel.vae_split import SplitVae, join_vae, split_vae

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """One clip and how it is split; ``loss`` says who computes what of it."""

    dim: str
    frames: int
    height: int
    batch: int = 1
    dtype: torch.dtype = torch.float64
    loss: str = "of_parts"
    channels_last: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        last = "-last" if self.channels_last else ""
        return f"{self.dim}-{self.batch}x{self.frames}x{self.height}-{kind}-{self.loss}{last}"


CASES = {
    2: [
        Case("frames", 9, 16, batch=2),  # two latent frames and one
        Case("frames", 5, 16, loss="of_whole"),  # rank 0 has the first frame alone
        Case("frames", 13, 8, loss="of_shares"),
        Case("frames", 13, 16, dtype=torch.float32, channels_last=True),
        Case("height", 5, 24, batch=2),  # two latent rows and one
        Case("height", 1, 24, loss="of_shares"),
        Case("height", 5, 40, loss="of_whole", channels_last=True),
        Case("height", 9, 24, dtype=torch.float32, channels_last=True),
    ],
    4: [
        Case("frames", 13, 8),  # every halo of two frames comes from two ranks
        Case("frames", 17, 16, dtype=torch.float32),
        Case("height", 1, 40, batch=2),
        Case("height", 5, 32, dtype=torch.float32, loss="of_whole"),
    ],
}


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> CausalVae3D:
    sizes: dict[str, Any] = {
        "latent_channels": 4,
        "block_channels": [4, 4, 8, 8],
        "layers_per_block": 1,
        "norm_groups": 2,
    }
    vae = CausalVae3D(VaeConfig(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(neutral, spread, generator=generator)
    return vae.to(dtype)


def group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def clip(case: Case) -> tuple[Tensor, Tensor]:
    """Return pixels and posterior noise of the whole clip."""
    generator = torch.Generator().manual_seed(1)
    width = 16 if case.dim == "height" else 8
    pixels = torch.rand((case.batch, 3, case.frames, case.height, width), generator=generator)
    size = (case.batch, 4, (case.frames - 1) // 4 + 1, case.height // 8, width // 8)
    noise = torch.randn(size, generator=generator)
    return (2 * pixels - 1).to(case.dtype), noise.to(case.dtype)


def weights(pixels: Tensor) -> Tensor:
    """Return another weight for each frame and row."""
    frames, rows = (torch.arange(1.0, n + 1).to(pixels) for n in pixels.shape[2:4])
    return (1 / (frames[:, None, None] + rows[:, None])).expand_as(pixels)


def errors(decoded: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
    """Return a weighted sum of absolute errors, rounded at 0 where rounding would flip signs."""
    return (((decoded - pixels).square() + 0.01).sqrt() * weight).sum()


def loss_of(case: Case, split: SplitVae, decoded: Tensor, kl: Tensor, pixels: Tensor) -> Tensor:
    """Return this rank's loss: the whole one, or one of those that it is the sum of."""
    weight = weights(pixels)
    if case.loss == "of_whole":
        return errors(split.gather(decoded), pixels, weight) + 0.1 * split.total(kl).sum()
    if case.loss == "of_shares":
        ranks = torch.arange(1, dist.get_world_size() + 1).to(pixels)
        share = ranks[dist.get_rank()] / ranks.sum()
        return errors(split.gather(decoded, partial=True), pixels, share * weight) + 0.1 * kl.sum()
    parts = (split.part_of(each) for each in (pixels, weight))
    return errors(decoded, *parts) + 0.1 * kl.sum()


def results(
    vae: CausalVae3D, posterior: Posterior, decoded: Tensor, pixels: Tensor
) -> dict[str, Tensor]:
    named = {name: parameter.grad for name, parameter in vae.named_parameters()}
    found = {
        "mean": posterior.mean,
        "std": posterior.std,
        "decoded": decoded,
        "pixels": pixels.grad,
    }
    return {name: t.detach() for name, t in (found | named).items() if t is not None}


def in_one_process(case: Case) -> dict[str, Tensor]:
    vae = build(case.dtype)
    pixels, noise = clip(case)
    pixels.requires_grad_()
    posterior = vae.encode(pixels)
    decoded = vae.decode(posterior.sample(noise))
    loss = errors(decoded, pixels.detach(), weights(pixels)) + 0.1 * posterior.kl().sum()
    loss.backward()
    return results(vae, posterior, decoded, pixels)


def in_parts(case: Case) -> dict[str, Tensor]:
    """Return the same from the ranks of the group: gathered values and added gradients."""
    vae = build(case.dtype)
    if case.channels_last:
        vae.to(memory_format=torch.channels_last_3d)
    split = split_vae(vae, group(), case.dim)
    pixels, noise = clip(case)
    if case.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
    pixels.requires_grad_()
    posterior = split.encode(split.part_of(pixels))
    decoded = split.decode(posterior.sample(split.latent_part_of(noise)))
    loss_of(case, split, decoded, posterior.kl(), pixels.detach()).backward()
    for tensor in (pixels, *vae.parameters()):
        assert tensor.grad is not None
        dist.all_reduce(tensor.grad)
    posterior = Posterior(split.gather(posterior.mean), split.gather(posterior.std))
    return results(vae, posterior, split.gather(decoded), pixels)


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest relative error of latents, pixels and gradients.

    In float64 each parameter counts by itself; those whose gradient is zero but for rounding, as
    the keys' bias, against 1e-3 of all. In float32 one process is as far from the truth as that for
    many small gradients, so there all parameters count as one vector.
    """
    assert found.keys() == wanted.keys()
    values = ["mean", "std", "decoded", "pixels"]
    grads = [name for name in wanted if name not in values]
    wrong = {name: float((found[name] - one).norm()) for name, one in wanted.items()}
    sizes = {name: float(one.norm()) for name, one in wanted.items()}
    if wanted["mean"].dtype == torch.float64:
        floor = 1e-3 * max(sizes[name] for name in grads)
        by_parameter = [wrong[name] / max(sizes[name], floor) for name in grads]
    else:
        by_parameter = [math.hypot(*map(wrong.get, grads)) / math.hypot(*map(sizes.get, grads))]
    return max(*(wrong[name] / sizes[name] for name in values), *by_parameter)


def _all_cases(rank: int, world: int) -> dict[str, float]:
    found = {str(case): in_parts(case) for case in CASES[world]}
    # All ranks have the same, gathered and added up.
    return {
        str(case): largest_error(found[str(case)], in_one_process(case))
        for case in CASES[world]
        if rank == 0
    }


@functools.cache
def measured(world: int) -> dict[str, float]:
    """Return the largest error of every case; the ranks are started once."""
    return run_distributed(_all_cases, world)[0]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for world, cases in CASES.items() for case in cases],
    ids=lambda value: str(value),
)
def test_parts_agree_with_the_whole_clip(world: int, case: Case) -> None:
    assert measured(world)[str(case)] <= TOLERANCE[case.dtype]
