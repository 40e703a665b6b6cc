"""Overlapping tiles for videos too large to encode or decode at once.

Tiles advance by a stride shorter than they are; the later tile fades in linearly over the overlap,
from weight 0 on its first row. Because the VAE's norms and attention see one tile only, a tiled
result is not the untiled one; it is the released model's own way of working, and its last training
phase used it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hunyuan_train.models.vae.config import SPATIAL_RATIO, TEMPORAL_RATIO, VaeConfig

TIME, HEIGHT, WIDTH = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Axis:
    """How tiles run along one direction; sizes count positions of the input or of the output."""

    tile: int
    """Input positions in a tile."""

    stride: int
    """Input positions between the starts of two tiles."""

    out_tile: int
    """Output positions a whole tile yields."""

    out_stride: int
    """Output positions kept of each tile."""

    @property
    def blend(self) -> int:
        """Output positions over which neighbours are mixed."""
        return self.out_tile - self.out_stride


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of one direction of the VAE; None leaves that direction whole."""

    space: Axis | None
    time: Axis | None

    @classmethod
    def for_encode(cls, cfg: VaeConfig) -> "Tiling":
        """Return tiles counted in pixels going to latents."""
        size, stride = cfg.tile_size_px, cfg.tile_stride_px
        frames, hop = cfg.tile_frames, cfg.tile_stride_frames
        space = Axis(size, stride, size // SPATIAL_RATIO, stride // SPATIAL_RATIO)
        time = Axis(frames, hop, frames // TEMPORAL_RATIO, hop // TEMPORAL_RATIO)
        return cls(space if cfg.tile_spatial else None, time if cfg.tile_temporal else None)

    @classmethod
    def for_decode(cls, cfg: VaeConfig) -> "Tiling":
        """Return tiles counted in latents going to pixels."""
        encode = cls.for_encode(cfg)
        return cls(_reverse(encode.space), _reverse(encode.time))


def tiled(run: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling) -> Tensor:
    """Return ``run(x)``, computed in tiles where x exceeds them and cut to the exact size.

    Args:
        run: Encoder or decoder of one tile, [B, C, T, H, W] to [B, C', T', H', W'].
        x: [B, C, T, H, W].
        tiling: Tile sizes in the units of x and of the result.
    """
    if tiling.time is None or x.shape[TIME] <= tiling.time.tile:
        return _tiled_space(run, x, tiling.space)
    return _tiled_time(run, x, tiling.time, tiling.space)


def _tiled_time(
    run: Callable[[Tensor], Tensor], x: Tensor, axis: Axis, space: Axis | None
) -> Tensor:
    # A tile is one frame longer than its size: its first frame takes the role that frame 0 of a
    # video has (one frame to one latent) and is dropped again, except in the first tile.
    kept: list[Tensor] = []
    previous: Tensor | None = None
    for start in range(0, x.shape[TIME], axis.stride):
        tile = _tiled_space(run, x[:, :, start : start + axis.tile + 1], space)
        keep = axis.out_stride
        if previous is None:
            keep += 1
        else:
            tile = _fade(previous, tile[:, :, 1:], axis.blend, TIME)
        kept.append(tile[:, :, :keep])
        previous = tile
    frames = 1 + _scaled(x.shape[TIME] - 1, axis)
    return torch.cat(kept, dim=TIME)[:, :, :frames]


def _tiled_space(run: Callable[[Tensor], Tensor], x: Tensor, axis: Axis | None) -> Tensor:
    height, width = x.shape[HEIGHT:]
    if axis is None or (height <= axis.tile and width <= axis.tile):
        return run(x)
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for band in _bands(x, axis, HEIGHT):
        row: list[Tensor] = []
        for column, tile in enumerate(_bands(band, axis, WIDTH)):
            out = run(tile)
            # First down, then across, with neighbours that are blended already: where four tiles
            # meet, the values depend on this order.
            if above:
                out = _fade(above[column], out, axis.blend, HEIGHT)
            if row:
                out = _fade(row[-1], out, axis.blend, WIDTH)
            row.append(out)
        keep = axis.out_stride
        rows.append(torch.cat([out[..., :keep, :keep] for out in row], dim=WIDTH))
        above = row
    whole = torch.cat(rows, dim=HEIGHT)
    return whole[..., : _scaled(height, axis), : _scaled(width, axis)]


def _bands(x: Tensor, axis: Axis, dim: int) -> Iterator[Tensor]:
    size = x.shape[dim]
    for start in range(0, size, axis.stride):
        yield x.narrow(dim, start, min(axis.tile, size - start))


def _fade(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Return ``after`` with its first positions mixed from the last ones of ``before``."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if extent == 0:
        return after
    shape = [1] * after.ndim
    shape[dim] = extent
    weight = torch.arange(extent, device=after.device, dtype=after.dtype).view(shape) / extent
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head = after.narrow(dim, 0, extent)
    mixed = tail * (1 - weight) + head * weight
    return torch.cat([mixed, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)


def _scaled(size: int, axis: Axis) -> int:
    return size * axis.out_tile // axis.tile


def _reverse(axis: Axis | None) -> Axis | None:
    if axis is None:
        return None
    return Axis(axis.out_tile, axis.out_stride, axis.tile, axis.stride)
