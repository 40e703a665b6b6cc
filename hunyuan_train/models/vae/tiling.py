"""Overlapping tiles for videos too large to encode or decode at once.

Tiles advance by a stride shorter than they are; the later tile fades in linearly over the overlap,
from weight 0 on its first row. Because a network sees one tile only, a tiled result is not the
untiled one; it is the released models' own way of working, and the last training phase of
HunyuanVideo's VAE used it.

Time tiles are made one after the other, from a whole video or from a stream of frames: what is kept
between two of them is one tile.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.tile_work import Network, TileWork

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
        size, stride, ratio = cfg.tile_size_px, cfg.tile_stride_px, cfg.spatial_ratio
        frames, hop, pace = cfg.tile_frames, cfg.tile_stride_frames, cfg.temporal_ratio
        space = Axis(size, stride, size // ratio, stride // ratio)
        time = Axis(frames, hop, frames // pace, hop // pace)
        return cls(space if cfg.tile_spatial else None, time if cfg.tile_temporal else None)

    @classmethod
    def for_decode(cls, cfg: VaeConfig) -> "Tiling":
        """Return tiles counted in latents going to pixels."""
        encode = cls.for_encode(cfg)
        return cls(_reverse(encode.space), _reverse(encode.time))


def tiled(run: Network, x: Tensor, tiling: Tiling, work: TileWork) -> Tensor:
    """Return ``run(x)``, computed in tiles where x exceeds them.

    Args:
        run: Encoder or decoder of one tile, [B, C, T, H, W] to [B, C', T', H', W'].
        x: [B, C, T, H, W].
        tiling: Tile sizes in the units of x and of the result.
        work: How many tiles run together, and on which ranks.
    """
    if tiling.time is None or x.shape[TIME] <= tiling.time.tile:
        return next(_in_space(run, iter([x]), tiling.space, work))
    return torch.cat(list(tiled_stream(run, [x], tiling, work)), dim=TIME)


def tiled_stream(
    run: Network, pieces: Iterable[Tensor], tiling: Tiling, work: TileWork
) -> Iterator[Tensor]:
    """Yield what ``tiled`` returns for all pieces joined in time, one time tile after the other.

    Args:
        run: Encoder or decoder of one tile.
        pieces: [B, C, any number of frames, H, W], taken one by one as they are needed.
        tiling: As for ``tiled``.
        work: As for ``tiled``.

    Raises:
        ValueError: If there are no time tiles.
    """
    axis = tiling.time
    if axis is None:
        raise ValueError("a stream needs time tiles")
    tail: Tensor | None = None
    for tile in _in_space(run, _cut(pieces, axis), tiling.space, work):
        # A tile is one frame longer than its size: its first frame takes the role that frame 0 of a
        # video has (one frame to one latent) and is dropped again, except in the first tile.
        keep = axis.out_stride
        if tail is None:
            keep = tile.shape[TIME] if tile.shape[TIME] <= axis.out_tile else keep + 1
        else:
            tile = _fade(tail, tile[:, :, 1:], axis.blend, TIME)
        yield tile[:, :, :keep]
        tail = tile[:, :, max(0, tile.shape[TIME] - axis.blend) :]


def _cut(pieces: Iterable[Tensor], axis: Axis) -> Iterator[Tensor]:
    """Yield overlapping stretches of ``axis.tile + 1`` frames, or all if there are no more."""
    waiting: list[Tensor] = []
    have, first = 0, True
    for piece in pieces:
        waiting.append(piece)
        have += piece.shape[TIME]
        while have > axis.tile + 1:
            joined = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=TIME)
            yield joined[:, :, : axis.tile + 1]
            waiting = [joined[:, :, axis.stride :]]
            have, first = have - axis.stride, False
    if not waiting:
        return
    rest = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=TIME)
    if first and have <= axis.tile:
        yield rest
        return
    # The last stretch may be the frame alone that a tile shares with the one before it.
    while rest.shape[TIME] > 1:
        yield rest
        rest = rest[:, :, axis.stride :]


def _in_space(
    run: Network, stretches: Iterator[Tensor], axis: Axis | None, work: TileWork
) -> Iterator[Tensor]:
    """Yield ``run`` of every stretch, each computed in tiles of its height and width."""
    while (first := next(stretches, None)) is not None:
        count = len(_places(first, axis))
        # Small pictures have few tiles: stretches wait for each other until there is enough to do.
        window = [first, *islice(stretches, max(0, -(-work.width // count) - 1))]
        tiles = [tile for x in window for row in _grid(x, axis) for tile in row]
        outputs = work.run(run, tiles)
        for x in window:
            yield _stitch(_grid(x, axis), outputs, axis)


def _stitch(grid: list[list[Tensor]], outputs: Iterator[Tensor], axis: Axis | None) -> Tensor:
    if axis is None or len(grid) * len(grid[0]) == 1:
        return next(outputs)
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for line in grid:
        row: list[Tensor] = []
        for column in range(len(line)):
            out = next(outputs)
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
    return torch.cat(rows, dim=HEIGHT)


def _places(x: Tensor, axis: Axis | None) -> list[tuple[int, int]]:
    height, width = x.shape[HEIGHT:]
    if axis is None or (height <= axis.tile and width <= axis.tile):
        return [(0, 0)]
    return [(y, x) for y in range(0, height, axis.stride) for x in range(0, width, axis.stride)]


def _grid(x: Tensor, axis: Axis | None) -> list[list[Tensor]]:
    if axis is None or len(_places(x, axis)) == 1:
        return [[x]]
    return [list(_bands(band, axis, WIDTH)) for band in _bands(x, axis, HEIGHT)]


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


def _reverse(axis: Axis | None) -> Axis | None:
    if axis is None:
        return None
    return Axis(axis.out_tile, axis.out_stride, axis.tile, axis.stride)
