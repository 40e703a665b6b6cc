"""What a model says about itself, as data: how it is sharded and how it is initialised.

A model is single-device code. Everything that spreads it over devices reads these records instead
of knowing the model's classes.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


class Cut(StrEnum):
    """How a linear is divided over tensor-parallel ranks.

    Tokens may be in sequence shards between a ``ROW`` and the next ``COLUMN``; a vector (one per
    sample) is whole on every rank outside such a pair.
    """

    COLUMN = "column"
    """Rows of the weight: tokens in, this rank's heads or hidden units out."""
    ROW = "row"
    """Columns of the weight: this rank's heads or hidden units in, tokens out."""
    VECTOR_COLUMN = "vector_column"
    """As ``COLUMN``, for a vector."""
    VECTOR_ROW = "vector_row"
    """As ``ROW``, for a vector."""
    GATHERED = "gathered"
    """Rows of the weight, but every rank gets the whole output. What uses the output may work on
    sequence shards."""


@dataclass(frozen=True, slots=True)
class LinearCut:
    """The cut of some linears."""

    pattern: str
    """Their module names; ``*`` matches anything."""
    cut: Cut
    parts: tuple[int, ...] = ()
    """Sizes of the tensors fused in the cut dim, each of which is divided; empty for one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingPlan:
    """How a model may be spread over devices."""

    units: tuple[str, ...]
    """Names of the repeated submodules, in execution order: each is gathered, run and released on
    its own by ZeRO, and is the unit of recomputation and compilation. Parameters outside every
    unit belong to the root."""
    cuts: tuple[LinearCut, ...]
    """Linears divided over tensor-parallel ranks; the first pattern that matches counts. All other
    parameters are whole on every rank."""
    per_head: tuple[str, ...]
    """Patterns of whole parameters that each rank applies to its own heads only, so that their
    gradient is a sum over tensor-parallel ranks."""
    per_token: tuple[str, ...]
    """Patterns of whole parameters that each rank applies to its own sequence shard."""
    token_modules: tuple[str, ...]
    """Names of the modules whose ``tokens`` says which tokens are here; "" is the model."""
    core_modules: tuple[str, ...]
    """Patterns of the modules whose ``core`` attends over sequence shards."""
    whole: bool = False
    """Whether ZeRO gathers the model at once and not unit by unit: where ranks run a unit unequally
    often in one forward, as in tiles, gathering by units would wait for ranks that do not come."""
    divisors: tuple[tuple[str, int], ...]
    """(config field, value) of what tensor-parallel ranks divide; the first is also divided by
    Ulysses ranks."""

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the unit modules of ``model``, in execution order."""
        return [model.get_submodule(name) for name in self.units]

    def cut_of(self, module_name: str) -> LinearCut | None:
        """Return how the linear of this name is cut, None if it stays whole."""
        return next((c for c in self.cuts if fnmatchcase(module_name, c.pattern)), None)


class InitKind(StrEnum):
    """Distribution of a freshly initialised parameter."""

    ZEROS = "zeros"
    ONES = "ones"
    NORMAL = "normal"
    UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class InitRule:
    """Initial value of one parameter: a constant, N(0, scale^2) or U(-scale, scale)."""

    kind: InitKind
    scale: float = 0.0

    @torch.no_grad()
    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        """Overwrite ``tensor`` in place; ``generator`` must live on the tensor's device."""
        match self.kind:
            case InitKind.ZEROS:
                tensor.zero_()
            case InitKind.ONES:
                tensor.fill_(1.0)
            case InitKind.NORMAL:
                tensor.normal_(0.0, self.scale, generator=generator)
            case InitKind.UNIFORM:
                tensor.uniform_(-self.scale, self.scale, generator=generator)


ZEROS = InitRule(InitKind.ZEROS)
ONES = InitRule(InitKind.ONES)


def fan_in_uniform(fan_in: int) -> InitRule:
    """Return U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the framework default of linear layers."""
    return InitRule(InitKind.UNIFORM, 1.0 / math.sqrt(fan_in))


def xavier_uniform(fan_in: int, fan_out: int) -> InitRule:
    """Return U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16)."""
    return InitRule(InitKind.UNIFORM, math.sqrt(6.0 / (fan_in + fan_out)))


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyLink:
    """One tensor of ours and the same numbers in the diffusers layout."""

    ours: str
    """Our key, which is also the officially released one."""
    shape: tuple[int, ...]
    """Our shape."""
    diffusers: tuple[str, ...]
    """The diffusers keys whose tensors, stacked on dim 0, are ours."""
    rows: tuple[int, ...]
    """How many rows of dim 0 each of them has."""
    swap_halves: bool = False
    """Whether diffusers has the two halves of dim 0 in the opposite order."""

    def diffusers_shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of each diffusers tensor."""
        return [(rows, *self.shape[1:]) for rows in self.rows]

    def to_diffusers(self, ours: Tensor) -> list[Tensor]:
        """Cut our tensor into the diffusers tensors; views, unless halves are swapped."""
        return list((swapped_halves(ours) if self.swap_halves else ours).split(self.rows))

    def from_diffusers(self, parts: list[Tensor]) -> Tensor:
        """Stack the diffusers tensors into ours."""
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return swapped_halves(joined) if self.swap_halves else joined


def swapped_halves(tensor: Tensor) -> Tensor:
    """Exchange the first and the second half of dim 0."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def identity_link(key: str, shape: tuple[int, ...]) -> KeyLink:
    """Return the link of a tensor that has the same name everywhere."""
    return KeyLink(ours=key, shape=shape, diffusers=(key,), rows=shape[:1])
