"""Tiles in batches, over ranks and as a stream give what tiles one by one give."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.tile_work import TileWork, deal


def new_vae(**changes) -> Vae:
    sizes = {
        "latent_channels": 4,
        "block_channels": [4, 4, 8, 8],
        "layers_per_block": 1,
        "norm_groups": 2,
        "tile_size_px": 32,
        "tile_frames": 16,
    }
    vae = build_vae(VaeConfig(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return vae.channels_last().eval()


def video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("batch", [3, pytest.param(100, marks=pytest.mark.again)])
def test_tiles_together(batch):
    vae, pixels = new_vae(), video(2, 3, 25, 56, 80)
    sizes: list[int] = []
    vae.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[0]))
    expected = vae.encode(pixels)
    alone = vae.decode(expected.mean)
    assert set(sizes) == {2}
    vae.work = TileWork(batch=batch)
    posterior = vae.encode(pixels)
    assert max(sizes) > 2
    assert max(sizes) <= 2 * batch
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.std, expected.std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(expected.mean), alone, rtol=1e-5, atol=1e-4)


class Answered:
    """One of several ranks, whose others have answered before."""

    def __init__(self, rank: int, answers: dict[int, list[Tensor]], size: int) -> None:
        self.rank, self.size, self.answers = rank, size, answers

    def gather(self, mine: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
        self.answers.setdefault(self.rank, []).extend(mine)
        queues = {rank: iter(tiles) for rank, tiles in self.answers.items()}
        blank = torch.zeros(1, 8, 5, 4, 4)
        return [next(queues[rank], blank) if rank in queues else blank for rank in owners]


@torch.no_grad()
def test_every_tile_is_run_by_one_rank():
    vae = new_vae(tile_temporal=False)
    pixels = video(1, 3, 5, 56, 80)
    expected, answers = vae.encode_tile, {}
    runs: list[Tensor] = []
    tiles = [
        pixels[..., y : y + 32, x : x + 32] for y in range(0, 56, 24) for x in range(0, 80, 24)
    ]
    for rank in range(3):
        work = TileWork(spread=Answered(rank, answers, 3))
        runs = list(work.run(expected, tiles))
    assert sum(len(part) for part in answers.values()) == len(tiles)
    assert min(len(part) for part in answers.values()) >= len(tiles) // 3 - 1
    assert all(torch.equal(run, expected(tile)) for run, tile in zip(runs, tiles, strict=True))


def test_dear_tiles_are_dealt_first():
    assert deal([1, 8, 1, 8, 2, 2], 2) == [0, 0, 1, 1, 0, 1]
    assert deal([5], 3) == [0]


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 9, 16 - 3, 17, 21, 25, 37, 61])
@pytest.mark.parametrize(
    "piece", [1, *(pytest.param(n, marks=pytest.mark.again) for n in (7, 100))]
)
def test_a_stream_is_the_clip(frames, piece):
    vae = new_vae()
    pixels = (video(1, 3, frames, 40, 32) + 1).mul(127).byte()
    whole = vae.encode(pixels.float().div(127.5).sub(1))
    streamed = list(vae.encode_stream(pixels.split(piece, dim=2)))
    assert torch.equal(torch.cat([p.mean for p in streamed], dim=2), whole.mean)
    assert torch.equal(torch.cat([p.std for p in streamed], dim=2), whole.std)
    decoded = torch.cat(list(vae.decode_stream(whole.mean.split(piece, dim=2))), dim=2)
    assert torch.equal(decoded, vae.decode(whole.mean))


@torch.no_grad()
def test_a_stream_is_read_as_it_is_needed():
    vae, taken = new_vae(), 0

    def frames():
        nonlocal taken
        for _ in range(61):
            taken += 1
            yield torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8)

    stream = vae.encode_stream(frames())
    assert next(stream).mean.shape[2] == 4
    assert taken == 18  # a tile of 16, the frame it shares, and one to see that there is more
    assert next(stream).mean.shape[2] == 3
    assert taken == 18 + 12


def test_a_stream_that_does_not_fit_is_refused():
    frames = [torch.zeros(1, 3, 1, 16, 16)] * 6
    with pytest.raises(ValueError, match=r"6 frames .* nearest are 5 and 9"):
        list(new_vae().encode_stream(frames))
    with pytest.raises(ValueError, match="height of 20 px"):
        list(new_vae().encode_stream([torch.zeros(1, 3, 1, 20, 16)]))
    with pytest.raises(ValueError, match=r"\[1, 3, 1, 2, 2\] cannot be decoded"):
        list(new_vae().decode_stream([torch.zeros(1, 3, 1, 2, 2)]))
    strict = new_vae(kind="vae_hy15", block_channels=[4, 8, 8, 8, 8], tile_temporal=False,
                     tile_size_px=64)  # fmt: skip
    with pytest.raises(ValueError, match=r"vae_hy15 .* takes whole clips, not a stream"):
        list(strict.encode_stream(frames))
    assert list(new_vae().encode_stream([])) == []
