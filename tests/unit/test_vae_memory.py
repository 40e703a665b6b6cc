"""The memory of a VAE's tile as predicted, against what running it holds."""

import pytest
import torch

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.sampling import use_free_memory
from hunyuan_train.memory.tracing import LiveBytes
from hunyuan_train.memory.vae import (
    KERNEL_FACTOR,
    choose_tile_batch,
    tile_shape,
    vae_peak_bytes,
    weight_bytes,
)
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.tile_work import TileWork
from hunyuan_train.runtime.dist import World

CONFIGS = {
    "vae_884": VaeConfig(
        latent_channels=4, block_channels=[8, 8, 16, 16], layers_per_block=1, norm_groups=4,
        tile_size_px=64, tile_frames=16,
    ),
    "vae_hy15": VaeConfig(
        kind="vae_hy15", latent_channels=4, block_channels=[8, 8, 16, 16, 16], layers_per_block=1,
        tile_size_px=64, tile_temporal=False,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.again)])
@pytest.mark.parametrize("decode", [False, True], ids=["encode", "decode"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_prediction(kind, decode, batch):
    cfg = CONFIGS[kind]
    vae = build_vae(cfg).eval()
    frames, ratio = 17, cfg.spatial_ratio
    predicted = vae_peak_bytes(cfg, (frames, 64, 64), decode=decode, batch=batch)
    shape = (batch, 4, 5, 64 // ratio, 64 // ratio) if decode else (batch, 3, frames, 64, 64)
    with LiveBytes() as live:
        x = torch.rand(shape)
        (vae.decode_tile if decode else vae.encode_tile)(x)
    assert live.peak_bytes == pytest.approx(predicted, rel=0.1)


@torch.no_grad()
def test_a_whole_video_holds_one_batch_of_tiles_besides_its_ends():
    cfg = CONFIGS["vae_884"]
    vae = build_vae(cfg).eval()
    pixels = torch.rand(1, 3, 33, 136, 112)
    for batch in (1, 2):
        vae.work = TileWork(batch=batch)
        with LiveBytes() as live:
            vae.encode(pixels)
        predicted = vae_peak_bytes(cfg, (33, 136, 112), batch=batch)
        # Cutting it makes views of the video, so that it is counted too.
        assert 0.9 * predicted < live.peak_bytes - pixels.nbytes < 1.1 * predicted


def test_tile_shape():
    cfg = CONFIGS["vae_884"]
    assert tile_shape(cfg, (33, 136, 32)) == (17, 64, 32)
    assert tile_shape(cfg, (13, 64, 64)) == (13, 64, 64)
    assert tile_shape(CONFIGS["vae_hy15"], (33, 136, 32)) == (33, 64, 32)


def test_as_many_tiles_as_fit():
    cfg, video = CONFIGS["vae_884"], (33, 136, 112)
    one = KERNEL_FACTOR * vae_peak_bytes(cfg, video)
    assert choose_tile_batch(cfg, video, round(3.5 * one)) == 3
    assert choose_tile_batch(cfg, video, round(1.01 * one)) == 1
    assert choose_tile_batch(cfg, video, 1000 * round(one), most=8) == 8
    three = KERNEL_FACTOR * vae_peak_bytes(cfg, video, batch=3)
    assert three <= 3.5 * one


def test_a_tile_that_does_not_fit_is_refused_with_one_that_does():
    cfg, video = CONFIGS["vae_884"], (33, 136, 112)
    free = round(0.5 * vae_peak_bytes(cfg, video))
    message = r"encoding one tile of 17 frames of 64 x 64 px takes .* set vae.tile_size_px=32 "
    with pytest.raises(ValueError, match=message):
        choose_tile_batch(cfg, video, free)
    with pytest.raises(ValueError, match=r"decoding one tile .* GiB are free; free some"):
        choose_tile_batch(cfg, video, 1000, decode=True)


def test_sampling_decodes_as_many_tiles_together_as_the_gpu_has_room_for(monkeypatch, caplog):
    cfg, bucket = CONFIGS["vae_884"], Bucket(33, 128, 112)
    vae = build_vae(cfg)
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cuda"))
    one = KERNEL_FACTOR * vae_peak_bytes(cfg, (33, 128, 112), decode=True)
    for room, batch in ((5.0, 4), (0.5, 1)):
        free = round(room * one)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2 * free))
        use_free_memory(vae, bucket, world)
        assert vae.work.batch == batch
    assert "decoding one tile of 17 frames of 64 x 64 px takes" in caplog.text


def test_released_sizes_are_known_without_memory():
    assert weight_bytes(VaeConfig(), torch.float16) == 2 * 246_478_803
    one = vae_peak_bytes(VaeConfig(), (129, 720, 1280), decode=True, dtype=torch.float16)
    assert 5 < one / 2**30 < 20
