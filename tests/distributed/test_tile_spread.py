"""Tiles spread over two ranks give what one process gives."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from hunyuan_train.evaluation.sample import decode_latents
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.tile_work import TileWork
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import build_axes
from hunyuan_train.parallel.tile_spread import RankSpread, tile_spread

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")


def new_vae() -> Vae:
    cfg = VaeConfig(
        latent_channels=2,
        block_channels=[2, 2, 4, 4],
        layers_per_block=1,
        norm_groups=2,
        tile_size_px=32,
        tile_frames=16,
    )
    vae = build_vae(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    return vae


def video() -> Tensor:
    return torch.rand(1, 3, 21, 40, 56, generator=torch.Generator().manual_seed(1)) * 2 - 1


def both_ways(rank: int, world: int, batch: int) -> tuple[Tensor, Tensor, list[int]]:
    """Encode and decode on two ranks; return what came out, and the tiles this rank decoded."""
    group = dist.group.WORLD
    assert group is not None
    vae = new_vae()
    decoded: list[int] = []
    vae.decoder.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0].shape[0]))
    vae.work = TileWork(batch=batch, spread=RankSpread(group, CPU))
    latents = vae.encode(video()).mean
    vae.work = TileWork(batch=batch)
    return latents, decode_latents(vae, latents, RankSpread(group, CPU)), decoded


@pytest.mark.parametrize("batch", [1, 3])
def test_two_ranks_share_the_tiles(batch):
    vae = new_vae()
    latents = vae.encode(video()).mean
    pixels = decode_latents(vae, latents)
    found = run_distributed(both_ways, 2, batch)
    for mean, decoded, _ in found:
        torch.testing.assert_close(mean, latents, rtol=0, atol=0 if batch == 1 else 1e-6)
        close = {"rtol": 0, "atol": 0 if batch == 1 else 1e-5}
        torch.testing.assert_close(decoded, pixels, **close)
    tiles = [sum(ran) for _, _, ran in found]
    assert sum(tiles) == 12
    assert abs(tiles[0] - tiles[1]) <= 1


def ranks_that_share(rank: int, world: int) -> tuple[int, int] | None:
    spread = tile_spread(build_axes(ParallelConfig(cp_ulysses=world), "cpu", world), CPU)
    return None if spread is None else (spread.rank, spread.size)


def test_the_ranks_of_one_batch_share():
    assert run_distributed(ranks_that_share, 2) == [(0, 2), (1, 2)]
