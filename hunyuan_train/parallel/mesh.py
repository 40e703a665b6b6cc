"""The device mesh: which ranks share what, and the groups they talk in."""

from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hunyuan_train.parallel.config import ParallelConfig

DIMS = ("dp_replicate", "dp_shard", "cp_ring", "cp_ulysses", "tp")
"""Axes of the mesh, outermost first: neighbouring ranks share a tensor-parallel group."""

JOINED = {
    "dp": ("dp_replicate", "dp_shard"),
    "cp": ("cp_ring", "cp_ulysses"),
    "zero": ("dp_shard", "cp_ring", "cp_ulysses"),
    "grads": ("dp_replicate", "dp_shard", "cp_ring", "cp_ulysses"),
    "model": ("cp_ring", "cp_ulysses", "tp"),
}
"""Axes that act as one: ``dp`` has distinct data, ``cp`` one sequence, ``zero`` one sharded copy,
``grads`` adds up gradients, ``model`` works on one batch."""


@dataclass(frozen=True, slots=True)
class Axes:
    """This rank's place on the mesh. Axis names are those of ``DIMS`` and ``JOINED``."""

    mesh: DeviceMesh | None
    """All axes of ``DIMS``; None for a process that works alone, whatever the world."""
    zero_mesh: DeviceMesh | None
    """The same ranks as ``dp_replicate x zero x tp``, for ``fully_shard``."""
    joined: dict[str, DeviceMesh]
    sequence_parallel: bool

    @classmethod
    def alone(cls) -> "Axes":
        """Return the axes of a single process: every axis has one rank and nothing is sent."""
        return cls(None, None, {}, False)

    def size(self, axis: str) -> int:
        """Return the number of ranks along an axis."""
        return 1 if self.mesh is None else self._dim(axis).size()

    def rank(self, axis: str) -> int:
        """Return this rank's position along an axis."""
        return 0 if self.mesh is None else self._dim(axis).get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the group of the ranks that differ from this one along the axis only."""
        return self._dim(axis).get_group()

    def sum(self, values: Tensor, axis: str) -> Tensor:
        """Add a tensor over the ranks of an axis in place and return it."""
        if self.size(axis) > 1:
            dist.all_reduce(values, group=self.group(axis))
        return values

    def _dim(self, axis: str) -> DeviceMesh:
        assert self.mesh is not None, "a process that works alone has no groups"
        return self.joined[axis] if axis in self.joined else self.mesh[axis]

    @property
    def sequence_axis(self) -> str:
        """The axis along which both token streams are sharded."""
        return "model" if self.sequence_parallel else "cp"

    @property
    def is_writer(self) -> bool:
        """Whether this rank speaks for the ranks that work on its batch."""
        return self.rank("model") == 0


def mesh_shape(cfg: ParallelConfig, world_size: int) -> tuple[int, ...]:
    """Return the sizes of ``DIMS``; ``dp_shard`` takes what the other axes leave.

    Raises:
        ValueError: the axes do not divide the world; names them and the sizes that work.
    """
    fixed = {
        "dp_replicate": cfg.dp_replicate,
        "cp_ring": cfg.cp_ring,
        "cp_ulysses": cfg.cp_ulysses,
        "tp": cfg.tp,
    }
    if world_size % prod(fixed.values()):
        product = " * ".join(f"{name}={size}" for name, size in fixed.items() if size > 1)
        fits = []
        for name, size in fixed.items():
            rest = prod(fixed.values()) // size
            if size > 1 and world_size % rest == 0:
                choices = " ".join(str(n) for n in _divisors(world_size // rest))
                fits.append(f"parallel.{name} in {choices}")
        advice = ", or ".join(fits) or f"sizes whose product is in {_listed(_divisors(world_size))}"
        raise ValueError(
            f"parallel: {product} is {prod(fixed.values())}, which does not divide the world size "
            f"{world_size}; choose {advice}"
        )
    shard = world_size // prod(fixed.values())
    return cfg.dp_replicate, shard, cfg.cp_ring, cfg.cp_ulysses, cfg.tp


def build_axes(cfg: ParallelConfig, device_type: str, world_size: int) -> Axes:
    """Lay all ranks out on the mesh; every rank calls it.

    Raises:
        ValueError: the axes do not divide the world.
    """
    shape = mesh_shape(cfg, world_size)
    replicate, shard, ring, ulysses, tp = shape
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=DIMS)
    zero_mesh = init_device_mesh(
        device_type,
        (replicate, shard * ring * ulysses, tp),
        mesh_dim_names=("dp_replicate", "zero", "tp"),
    )
    joined = {name: mesh[dims]._flatten(name) for name, dims in JOINED.items()}
    return Axes(mesh, zero_mesh, joined, cfg.sp)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(numbers: list[int]) -> str:
    return " ".join(str(n) for n in numbers)
