"""The autoencoder split over ranks against the whole clip in one process."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hunyuan_train.models.vae.base import Posterior
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.model import CausalVae3D
from hunyuan_train.parallel import vae_halo, vae_norm
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
        vae.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
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
        together = (math.hypot(*(of[name] for name in grads)) for of in (wrong, sizes))
        by_parameter = [next(together) / next(together)]
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


def _faults(rank: int, world: int) -> dict[str, float]:
    """Plant errors that leave every shape as it is; return how far off gradients are then."""
    case = Case("frames", 9, 8)
    wanted = in_one_process(case)
    combined, transfer = vae_norm._combined, vae_halo._Transfer.wait

    def alone(mean: Tensor, squares: Tensor, counts: Any, group: Any) -> tuple[Tensor, Tensor]:
        combined(mean, squares, counts, group)
        return mean, squares / counts[0]

    def nothing(self: vae_halo._Transfer) -> list[Tensor]:
        in_backward = not torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
        return [piece.zero_() if in_backward else piece for piece in transfer(self)]

    vae_norm._combined = alone
    found = {"norm of the own part": largest_error(in_parts(case), wanted)}
    vae_norm._combined = combined
    vae_halo._Transfer.wait = nothing
    found["lost gradients of neighbours"] = largest_error(in_parts(case), wanted)
    return found


@pytest.mark.dist
def test_planted_errors_are_noticed() -> None:
    for found in run_distributed(_faults, 2):
        assert all(error > 1e-3 for error in found.values()), found


def saved_bytes(run: Callable[[], Tensor], vae: CausalVae3D) -> int:
    """Return the bytes that a forward keeps for its backward, parameters aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in vae.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = run()  # alive until all is counted, so no address is used twice
    del loss
    return sum(kept.values())


def _repeated(rank: int, world: int, dim: str) -> tuple[float, list[bool]]:
    """Return the share of bytes kept, and whether a second run gives the same bits."""
    case = Case(dim, 17, 32, dtype=torch.float32)
    pixels, noise = clip(case)
    vae = build(case.dtype)

    def whole() -> Tensor:
        posterior = vae.encode(pixels)
        return vae.decode(posterior.sample(noise)).sum() + posterior.kl().sum()

    def part() -> Tensor:
        split = split_vae(vae, group(), dim)
        posterior = split.encode(split.part_of(pixels))
        decoded = split.decode(posterior.sample(split.latent_part_of(noise)))
        return decoded.sum() + posterior.kl().sum()

    share = 1 / saved_bytes(whole, vae)
    share *= saved_bytes(part, vae)
    first, second = in_parts(case), in_parts(case)
    return share, [torch.equal(first[name], second[name]) for name in first]


@pytest.mark.dist
@pytest.mark.parametrize("dim", ["frames", "height"])
def test_a_rank_keeps_its_share_and_repeats_the_same_bits(dim: str) -> None:
    for share, same in run_distributed(_repeated, 2, dim):
        assert share < 0.62
        assert all(same)


def _recomputed(rank: int, world: int) -> None:
    case = Case("frames", 9, 8, dtype=torch.float32)
    split = split_vae(vae := build(case.dtype), group(), case.dim)
    pixels, noise = clip(case)
    found: list[list[Tensor]] = []
    for again in (False, True):
        posterior = split.encode(split.part_of(pixels))
        decoded = split.decode(posterior.sample(split.latent_part_of(noise)))
        (decoded.square().sum() + posterior.kl().sum()).backward()
        found.append(
            [parameter.grad for parameter in vae.parameters() if parameter.grad is not None]
        )
        vae.zero_grad()
        for block in () if again else (*vae.encoder.down_blocks, *vae.decoder.up_blocks):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    assert len(found[0]) == len(list(vae.parameters()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.dist
def test_recompute_repeats_the_same_numbers() -> None:
    run_distributed(_recomputed, 2)


def _refusals(rank: int, world: int) -> None:
    vae = build(tile_size_px=16, tile_frames=16, tile_overlap=0.5)
    split = split_vae(vae, group(), "frames")
    with pytest.raises(ValueError, match=r"clip of 1 frames.*use at least 5 frames.*split=height"):
        split.part_of(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match=r"2 ranks leaves some of them nothing"):
        split.latent_part_of(torch.zeros(1, 4, 1, 2, 2))
    whole = torch.zeros(1, 3, 9, 16, 16, dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"rank 1 has a part of shape \[1, 3, 9, .*, and needs \[1, 3, 8, .* with part_of",
    ):
        split.encode(whole)
    with pytest.raises(ValueError, match=r"rank 0 .* needs \[1, 4, 3, 2, 2\]; .*latent_part_of"):
        split.decode(torch.zeros(1, 4, 2 + rank, 2, 2))
    for shape, field in (((1, 3, 9, 16, 24), "spatial"), ((1, 3, 17, 16, 16), "temporal")):
        with pytest.raises(
            ValueError, match=rf"^vae.tile_{field}=true .*set vae.tile_{field}=false"
        ):
            split.encode(split.part_of(torch.zeros(shape)))
    with pytest.raises(ValueError, match=r"a layer of a split VAE got .* or join_vae first"):
        vae.encode(whole)
    join_vae(vae)
    assert torch.equal(vae.encode(whole).mean, build().encode(whole).mean)


@pytest.mark.dist
def test_refuses_other_parts_and_tiles_by_name() -> None:
    run_distributed(_refusals, 2)


def test_one_device_needs_no_group() -> None:
    vae, pixels = build(), clip(Case("frames", 5, 16))[0]
    split = split_vae(vae, None, "frames")
    latents = split.encode(split.part_of(pixels)).mean
    assert torch.equal(latents, vae.encode(pixels).mean)
    assert torch.equal(split.gather(split.decode(latents)), vae.decode(latents))
    assert split.total(latents) is latents


def test_refuses_what_it_cannot_split() -> None:
    with pytest.raises(
        ValueError, match=r"parallel.vae_split=width is unknown; choose frames height"
    ):
        split_vae(build(), None, "width")
    with pytest.raises(ValueError, match=r"vae.kind=vae_884 only, not Linear"):
        split_vae(torch.nn.Linear(2, 2), None, "frames")  # pyright: ignore[reportArgumentType]
