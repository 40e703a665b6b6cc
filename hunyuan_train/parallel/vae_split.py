"""One clip of the autoencoder spread over ranks, along its frames or its height.

Exact: encoding and decoding parts gives the parts of what one device would give for the whole clip,
and the parameters' gradients of the ranks add up to those of one device. The model stays plain;
``split_vae`` replaces what its layers see beyond their own positions (``models.vae.reach``):

| layer | sends |
|---|---|
| convolution | the frames or rows next to a border, to the neighbours that read them |
| norm | two numbers per sample and group, to all |
| attention | keys and values at the latents' resolution, to all |
| enlargement | nothing; only the first rank has the frame that is not doubled |
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hunyuan_train.models.shapes import Latents
from hunyuan_train.models.vae.base import Pixels, Posterior, check_pixels
from hunyuan_train.models.vae.config import TEMPORAL_RATIO
from hunyuan_train.models.vae.layers import CausalConv3d
from hunyuan_train.models.vae.model import DOWN_STRIDES, UP_FACTORS, CausalVae3D
from hunyuan_train.models.vae.reach import WHOLE
from hunyuan_train.parallel.collectives import gather_runs, sum_to_whole
from hunyuan_train.parallel.config import VaeSplit
from hunyuan_train.parallel.vae_parts import SPATIAL_RATIO, Parts
from hunyuan_train.parallel.vae_reach import Place, SplitReach


class SplitVae:
    """Works on this rank's part of each clip; every rank of the group makes the same calls.

    A loss is either a sum over ranks, each rank's of its part, or computed alike on every rank from
    ``gather`` and ``total``. Both ways the gradients of a parameter have to be added over the
    group afterwards.
    """

    def __init__(self, vae: CausalVae3D, place: Place) -> None:
        """See ``split_vae``."""
        self._vae, self._place = vae, place

    def part_of(self, pixels: Pixels) -> Pixels:
        """Return this rank's frames or rows of a clip [B, 3, 4n+1, H, W], as a view.

        Raises:
            ValueError: The clip cannot be encoded, or a rank would get nothing.
        """
        check_pixels(pixels.shape, self._vae.cfg)
        size = pixels.shape[self._place.axis]
        parts = self._divided(_latents(size, self._place.dim))
        return self._cut(pixels, parts.run(self._place.rank, parts.ratio))

    def latent_part_of(self, latents: Latents) -> Latents:
        """Return this rank's part of latents, or of their noise, [B, C, n+1, h, w], as a view.

        Raises:
            ValueError: A rank would get nothing.
        """
        parts = self._divided(latents.shape[self._place.axis])
        return self._cut(latents, parts.run(self._place.rank, 1))

    def encode(self, pixels: Pixels) -> Posterior:
        """Return the posterior of this rank's latents for its part of the pixels.

        Raises:
            ValueError: The parts are not those of ``part_of``, or the clip would be tiled.
        """
        if self._place.ranks == 1:
            return self._vae.encode(pixels)
        shape = self._enter(pixels, pixel=True)
        check_pixels(torch.Size(shape), self._vae.cfg)
        return Posterior.from_moments(self._vae.quant_conv(self._vae.encoder(pixels)))

    def decode(self, latents: Latents) -> Pixels:
        """Return this rank's part of the pixels for its part of the latents.

        Raises:
            ValueError: The parts are not those of ``latent_part_of``, or the clip would be tiled.
        """
        if self._place.ranks == 1:
            return self._vae.decode(latents)
        self._enter(latents, pixel=False)
        return self._vae.decoder(self._vae.post_quant_conv(latents))

    def reconstruct(self, pixels: Pixels, noise: Latents) -> tuple[Pixels, Latents, Latents]:
        """Return the whole reconstruction, mean and std of whole clips, for a loss all compute.

        Args:
            pixels: [B, 3, 4n+1, H, W], the same on every rank.
            noise: Of the latents' shape, the same on every rank.
        """
        posterior = self.encode(self.part_of(pixels))
        decoded = self.decode(posterior.sample(self.latent_part_of(noise)))
        return self.gather(decoded), self.gather(posterior.mean), self.gather(posterior.std)

    def gather(self, part: Tensor, partial: bool = False) -> Tensor:
        """Return the whole of pixels or latents from the parts of all ranks.

        Args:
            part: [B, C, T, H, W], in the division of ``part_of`` or of ``latent_part_of``.
            partial: How a loss of the result is meant. False: every rank computes the same one, and
                each part gets its own gradient. True: every rank computes something else, their sum
                is meant, and each part gets the sum of its gradients.
        """
        if self._place.group is None or self._place.ranks == 1:
            return part
        lengths = tuple(shape[self._place.axis] for shape in self._shapes(part))
        return gather_runs(part, self._place.axis, lengths, self._place.group, partial)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, such as of ``Posterior.kl``, for a loss all compute alike."""
        if self._place.group is None or self._place.ranks == 1:
            return values
        return sum_to_whole(values, self._place.group)

    def _divided(self, latents: int) -> Parts:
        return Parts.of(self._place.dim, latents, self._place.ranks)

    def _cut(self, x: Tensor, run: range) -> Tensor:
        return x.narrow(self._place.axis, run.start, len(run))

    def _enter(self, part: Tensor, *, pixel: bool) -> list[int]:
        """Agree on the division of the clip and return the shape of the whole."""
        if part.ndim != 5:
            raise ValueError(
                f"a part of shape {list(part.shape)} has {part.ndim} dimensions and needs five: "
                "[batch, channels, frames, height, width]"
            )
        place, shapes = self._place, self._shapes(part)
        whole = list(shapes[0])
        whole[place.axis] = size = sum(shape[place.axis] for shape in shapes)
        parts = self._divided(_latents(size, place.dim) if pixel else size)
        for rank, shape in enumerate(shapes):
            wanted = list(whole)
            wanted[place.axis] = len(parts.run(rank, parts.ratio if pixel else 1))
            if shape != wanted:
                raise ValueError(
                    f"rank {rank} has a part of shape {shape} of a clip of shape {whole} that is "
                    f"split along {place.dim.value}, and needs {wanted}; cut the whole clip with "
                    f"{'part_of' if pixel else 'latent_part_of'} of what split_vae returned"
                )
        self._check_tiles(whole, pixel)
        place.parts = parts
        return whole

    def _check_tiles(self, whole: list[int], pixel: bool) -> None:
        cfg, (frames, height, width) = self._vae.cfg, whole[2:]
        if not pixel:
            frames, height, width = (
                TEMPORAL_RATIO * (frames - 1) + 1,
                SPATIAL_RATIO * height,
                SPATIAL_RATIO * width,
            )
        for name, on, size, tile in (
            ("tile_spatial", cfg.tile_spatial, max(height, width), cfg.tile_size_px),
            ("tile_temporal", cfg.tile_temporal, frames, cfg.tile_frames),
        ):
            if on and size > tile:
                raise ValueError(
                    f"vae.{name}=true would cut a clip of {frames}x{height}x{width} into tiles, "
                    f"but the {self._place.ranks} ranks of parallel.vae_split compute it whole; "
                    f"set vae.{name}=false"
                )

    def _shapes(self, part: Tensor) -> list[list[int]]:
        """Return the shape of every rank's part."""
        mine = torch.tensor(part.shape, device=part.device)
        shapes = [torch.empty_like(mine) for _ in range(self._place.ranks)]
        dist.all_gather(shapes, mine, group=self._place.group)
        return [shape.tolist() for shape in shapes]


def split_vae(vae: CausalVae3D, group: dist.ProcessGroup | None, dim: VaeSplit | str) -> SplitVae:
    """Let the ranks of ``group`` share every clip; replaces an earlier split.

    Args:
        vae: The network, equal on every rank; it is changed in place until ``join_vae``.
        group: The ranks, in the order of their parts; None, or a group of one, splits nothing.
        dim: Along what clips are cut.

    Raises:
        ValueError: Another kind of autoencoder, or an unknown ``dim``.
    """
    if not isinstance(vae, CausalVae3D):
        raise ValueError(
            f"parallel.vae_split splits vae.kind=vae_884 only, not {type(vae).__name__}; train "
            "this autoencoder with parallel.cp_ring=1 and parallel.cp_ulysses=1"
        )
    if dim not in list(VaeSplit):
        known = " ".join(VaeSplit)
        raise ValueError(f"parallel.vae_split={dim} is unknown; choose {known}")
    join_vae(vae)
    place = Place(group, VaeSplit(dim))
    if place.ranks > 1:
        for root, scale in _scales(vae, place.dim):
            for module in root.modules():
                if hasattr(module, "reach"):
                    module.reach = SplitReach(place, scale)  # pyright: ignore[reportArgumentType]
    return SplitVae(vae, place)


def join_vae(vae: nn.Module) -> None:
    """Undo ``split_vae``: the network again takes whole clips."""
    for module in vae.modules():
        if hasattr(module, "reach"):
            module.reach = WHOLE  # pyright: ignore[reportArgumentType]


def _scales(vae: CausalVae3D, dim: VaeSplit) -> Iterator[tuple[nn.Module, int]]:
    """Yield parts of the network and the positions to a latent one that their input has."""
    axis = 0 if dim is VaeSplit.frames else 1
    encoder, decoder = vae.encoder, vae.decoder
    scale = TEMPORAL_RATIO if dim is VaeSplit.frames else SPATIAL_RATIO
    yield encoder.conv_in, scale
    for block, stride in zip(encoder.down_blocks, DOWN_STRIDES, strict=True):
        yield block, scale
        scale //= stride[axis] if stride else 1
    for last in (encoder.mid_block, encoder.conv_norm_out, encoder.conv_out):
        yield last, scale
    yield decoder.conv_in, scale
    yield decoder.mid_block, scale
    for block, factor in zip(decoder.up_blocks, UP_FACTORS, strict=True):
        yield block, scale
        scale *= factor[axis] if factor else 1
        for upsampler in block.get_submodule("upsamplers").children():
            # Its convolution works on what is enlarged already.
            conv = upsampler.get_submodule("conv")
            assert isinstance(conv, CausalConv3d)
            yield conv, scale
    yield decoder.conv_norm_out, scale
    yield decoder.conv_out, scale


def _latents(pixels: int, dim: VaeSplit) -> int:
    if dim is VaeSplit.frames:
        return (pixels - 1) // TEMPORAL_RATIO + 1
    return pixels // SPATIAL_RATIO
