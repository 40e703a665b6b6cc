"""How much memory a VAE takes, known before it runs.

The network is run on tensors without values, so the count follows the code whatever the sizes are.
"""

from dataclasses import replace
from functools import cache

import torch

from hunyuan_train.memory.tracing import LiveBytes
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import TEMPORAL_RATIO, VaeConfig

KERNEL_FACTOR = 1.3
"""Room for what convolutions allocate inside, which the count does not see."""

Shape = tuple[int, int, int]
"""Pixel frames, height and width of a video."""


def vae_peak_bytes(
    cfg: VaeConfig,
    video: Shape,
    *,
    decode: bool = False,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return the most bytes that running one batch of tiles of a video holds, without gradients.

    Their input and their result count, the weights and the rest of the video do not.

    Args:
        cfg: The VAE.
        video: Size of the video; what exceeds a tile is run in tiles.
        decode: Latents to pixels instead of pixels to latents.
        batch: Tiles that run together.
        dtype: Number format of weights and pixels.
    """
    fields = tuple((name, _frozen(getattr(cfg, name))) for name in cfg.__slots__)
    return _traced(fields, tile_shape(cfg, video), decode, batch, dtype)


def weight_bytes(cfg: VaeConfig, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of all parameters."""
    with torch.device("meta"):
        vae = build_vae(cfg)
    return sum(parameter.numel() for parameter in vae.parameters()) * dtype.itemsize


def tile_shape(cfg: VaeConfig, video: Shape) -> Shape:
    """Return the size of the largest tile of a video, in pixels."""
    frames, height, width = video
    if cfg.tile_temporal and frames > cfg.tile_frames:
        frames = min(frames, cfg.tile_frames + 1)
    if cfg.tile_spatial:
        height, width = min(height, cfg.tile_size_px), min(width, cfg.tile_size_px)
    return frames, height, width


def choose_tile_batch(
    cfg: VaeConfig,
    video: Shape,
    free_bytes: int,
    *,
    decode: bool = False,
    dtype: torch.dtype = torch.float32,
    most: int = 16,
) -> int:
    """Return how many tiles of a video run together in ``free_bytes``, at most ``most``.

    Raises:
        ValueError: If not even one does; says what tile size would.
    """

    def needed(of: VaeConfig, batch: int) -> int:
        peak = vae_peak_bytes(of, video, decode=decode, batch=batch, dtype=dtype)
        return round(KERNEL_FACTOR * peak)

    one = needed(cfg, 1)
    if one <= free_bytes:
        # Every tile takes as much again: activations have no part that is shared.
        return max(1, min(most, free_bytes // one))
    advice = "free some, or take another machine"
    for size in _smaller_tiles(cfg):
        smaller = replace(cfg, tile_size_px=size, tile_spatial=True)
        if needed(smaller, 1) <= free_bytes:
            advice = f"set vae.tile_size_px={size} (tile_size_px in config.json of the VAE)"
            break
    frames, height, width = tile_shape(cfg, video)
    raise ValueError(
        f"{'decoding' if decode else 'encoding'} one tile of {frames} frames of {height} x "
        f"{width} px takes {one / 2**30:.2g} GiB, but {free_bytes / 2**30:.2g} GiB are free; "
        f"{advice}"
    )


def _smaller_tiles(cfg: VaeConfig) -> list[int]:
    """Return tile sizes below the config's, largest first, whose stride meets the latent grid."""
    sizes = range(cfg.tile_size_px - cfg.spatial_ratio, 0, -cfg.spatial_ratio)
    fits: list[int] = []
    for size in sizes:
        stride = round(size * (1 - cfg.tile_overlap))
        if stride and stride % cfg.spatial_ratio == 0:
            fits.append(size)
    return fits


@cache
def _traced(
    fields: tuple[tuple[str, object], ...],
    tile: Shape,
    decode: bool,
    batch: int,
    dtype: torch.dtype,
) -> int:
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in fields}
    cfg = VaeConfig(**values)  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        vae = build_vae(cfg).to(dtype).eval()
        frames, height, width = tile
        if decode:
            latents = (frames - 1) // TEMPORAL_RATIO + 1
            area = (height // cfg.spatial_ratio, width // cfg.spatial_ratio)
            shape = (batch, cfg.latent_channels, latents, *area)
        else:
            shape = (batch, cfg.in_channels, *tile)
        with torch.no_grad(), LiveBytes() as live:
            x = torch.empty(shape, dtype=dtype)
            result = vae.decode_tile(x) if decode else vae.encode_tile(x)
            del x, result
    return live.peak_bytes


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
