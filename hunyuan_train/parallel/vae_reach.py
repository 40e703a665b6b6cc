"""What the layers of a split autoencoder see beyond their own part of the clip."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hunyuan_train.parallel.collectives import gather_runs
from hunyuan_train.parallel.config import VaeSplit
from hunyuan_train.parallel.vae_halo import Halo, pad_with_neighbours
from hunyuan_train.parallel.vae_norm import split_group_norm
from hunyuan_train.parallel.vae_parts import Parts, border

TIME, HEIGHT = 2, 3


@dataclass(slots=True)
class Place:
    """This rank's place among those that share every clip, and the clip they are at."""

    group: dist.ProcessGroup | None
    dim: VaeSplit
    parts: Parts | None = None
    """Of the clip that is being encoded or decoded; None before the first."""

    @property
    def ranks(self) -> int:
        """Ranks that share a clip."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This one's number among them."""
        return 0 if self.group is None else self.group.rank()

    @property
    def axis(self) -> int:
        """The dimension of [B, C, T, H, W] that is divided."""
        return TIME if self.dim is VaeSplit.frames else HEIGHT


class SplitReach:
    """``models.vae.reach.Reach`` of layers whose input has ``scale`` positions to a latent one."""

    def __init__(self, place: Place, scale: int) -> None:
        """Bind a layer to this rank's place among those that share a clip."""
        assert place.group is not None, "one device needs no split"
        self._place, self._scale, self._group = place, scale, place.group

    @property
    def begins(self) -> bool:
        """See ``Reach``."""
        return self._place.axis == HEIGHT or self._place.rank == 0

    def clip_frames(self, x: Tensor) -> int:
        """See ``Reach``."""
        parts = self._parts_of(x)
        return x.shape[TIME] if self._place.axis == HEIGHT else parts.total(self._scale)

    def padded(self, x: Tensor, pads: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """See ``Reach``."""
        if x.ndim == 4:
            lone = self.padded(x.unsqueeze(TIME), (*pads, 0, 0), (1, *stride))
            return lone.squeeze(TIME)
        parts = self._parts_of(x)
        sides = [(pads[4], pads[5]), (pads[2], pads[3]), (pads[0], pads[1])]
        place = self._place.axis - 2
        around, real = border(parts, self._place.rank, self._scale, stride[place], sides[place])
        behind = real.stop - x.shape[self._place.axis]
        sides[place] = (around.before + real.start, around.after - behind)
        return pad_with_neighbours(x, Halo(self._place.axis, around, tuple(sides), self._group))

    def normalised(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See ``Reach``."""
        return split_group_norm(x, norm, self._lengths(self._parts_of(x)), self._group)

    def past(self, key: Tensor, value: Tensor, frames: int) -> tuple[Tensor, Tensor, int]:
        """See ``Reach``."""
        parts, rank = self._place.parts, self._place.rank
        assert parts is not None, "the norm in front has checked it"
        lengths = self._lengths(parts)
        # One message for both; [B, 2, T, positions here, C].
        pair = torch.cat([key, value], dim=1).unflatten(2, (frames, -1))
        if self._place.axis == TIME:
            whole = gather_runs(pair, 2, lengths, self._group, partial=True)
            whole, earlier = whole[:, :, : sum(lengths[: rank + 1])], sum(lengths[:rank])
        else:
            across = pair.shape[3] // lengths[rank]
            places = tuple(length * across for length in lengths)
            whole, earlier = gather_runs(pair, 3, places, self._group, partial=True), 0
        keys, values = whole.flatten(2, 3).split(1, dim=1)
        return keys, values, earlier

    def _lengths(self, parts: Parts) -> tuple[int, ...]:
        return tuple(len(parts.run(rank, self._scale)) for rank in range(self._place.ranks))

    def _parts_of(self, x: Tensor) -> Parts:
        parts, size = self._place.parts, x.shape[self._place.axis]
        if parts is None or size != len(parts.run(self._place.rank, self._scale)):
            raise ValueError(
                f"a layer of a split VAE got {list(x.shape)}, which is not this rank's part of "
                "the clip; call encode and decode of what split_vae returned, or join_vae first"
            )
        return parts
