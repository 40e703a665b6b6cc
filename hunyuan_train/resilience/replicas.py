"""Compares what several ranks hold alike: silent corruption makes one of them differ.

Weights, moments and averages that are not cut over some axis of the mesh are computed on each of
its ranks from the same numbers, so they agree to the last bit. Ranks that store the same boxes of a
tensor must store the same values; nothing here knows why a layout gives them the same boxes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.runtime.dist import gather_objects, max_over_ranks

_NAMED = 100
"""Tensors that are looked at closely once something differs."""

Digest = Callable[[Tensor], Tensor]
"""From what this rank stores of a tensor to int64 [N], on any device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What differs; the same on all ranks."""

    step: int
    ranks: tuple[int, ...]
    """Those that are wrong if ``certain``, else those one or more of which are."""
    certain: bool
    """Whether a majority says so."""
    tensors: tuple[str, ...]
    """In which they differ, at most 100."""
    sentence: str


class Replicas:
    """Compares the replicas of one run; every rank holds one and calls the same methods."""

    def __init__(self, cfg: ResilienceConfig, axes: Axes, digest: Digest) -> None:
        """Prepare.

        Args:
            cfg: How often.
            axes: This rank's place.
            digest: Of a plain tensor, DTensor or ``WholeView``; different for different values.
        """
        self._every, self._digest = cfg.replica_every, digest
        mesh = axes.zero_mesh
        dims = () if mesh is None else [mesh[name] for name in mesh.mesh_dim_names or ()]
        self._groups = [dim.get_group() for dim in dims if dim.size() > 1]
        self._device = torch.device("cpu" if mesh is None else mesh.device_type)
        self._boxes: Tensor | None = None
        self._alike: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Return whether a comparison is wanted after ``step`` updates."""
        return self._every > 0 and step % self._every == 0 and bool(self._groups)

    def check(self, step: int, tensors: Mapping[str, Any]) -> Verdict | None:
        """Compare the state with that of the other ranks; all ranks call it.

        Args:
            step: Updates done, for the verdict.
            tensors: Nested mappings of plain tensors, DTensors and ``WholeView``; the same names
                and the same cut at every call.

        Returns:
            None if all is well.
        """
        if not self._groups:
            return None
        named = list(_leaves(tensors))
        if self._boxes is None:
            self._compare_boxes(named)
        digests = [self._digest(tensor).to(self._device) for _, tensor in named]
        mine = torch.stack(digests)
        low, high = mine, mine
        for group, alike in zip(self._groups, self._alike, strict=True):
            least = torch.stack([low, ~high])
            dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
            low = torch.where(alike, least[0], low)
            high = torch.where(alike, ~least[1], high)
        differs = max_over_ranks((low != high).any(1).to(torch.int32))
        if not differs.any():
            return None
        return self._look_closely(step, [name for name, _ in named], mine, differs)

    def _compare_boxes(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Find out once which tensors are cut alike along which axis."""
        keys = [_boxes_key(name, tensor) for name, tensor in named]
        self._boxes = torch.tensor(keys, device=self._device)
        for group in self._groups:
            least = torch.stack([self._boxes, ~self._boxes])
            dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
            self._alike.append((least[0] == ~least[1])[:, None])

    def _look_closely(
        self, step: int, names: list[str], mine: Tensor, differs: Tensor
    ) -> Verdict | None:
        assert self._boxes is not None
        chosen = differs.nonzero()[:_NAMED, 0]
        boxes, values = self._boxes[chosen].tolist(), mine[chosen].tolist()
        gathered = gather_objects([*zip(boxes, map(tuple, values), strict=True)])
        return judge(step, [names[i] for i in chosen.tolist()], gathered)


def judge(
    step: int, names: Sequence[str], gathered: Sequence[Sequence[tuple[int, tuple[int, ...]]]]
) -> Verdict | None:
    """Say who is wrong.

    Args:
        step: Updates done.
        names: Tensors that differ somewhere, like ``optimizer/<parameter>/exp_avg``.
        gathered: For each rank and tensor, a number that stands for the boxes and the digest.

    Returns:
        What the clearest majorities say; None if nothing differs.
    """
    findings = []
    for index, name in enumerate(names):
        holders: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for rank, entries in enumerate(gathered):
            boxes, digest = entries[index]
            holders.setdefault(boxes, {}).setdefault(digest, []).append(rank)
        for camps in holders.values():
            if len(camps) > 1:
                largest, *others = sorted(camps.values(), key=len, reverse=True)
                odd = sorted(rank for camp in others for rank in camp)
                findings.append((len(largest) > len(odd), name, odd, largest))
    if not findings:
        return None
    certain = any(finding[0] for finding in findings)
    findings = [finding for finding in findings if finding[0] == certain]
    _, first, odd, largest = findings[0]
    tensors = tuple(dict.fromkeys(name for _, name, _, _ in findings))
    more = len(tensors) - 1
    where = _spoken(first) + (f" and {more} more tensor{'s' * (more > 1)}" if more else "")
    differ = "differs" if len(odd) == 1 else "differ"
    sentence = f"{_ranks(odd)} {differ} from {_ranks(largest)} in {where} at step {step}"
    blamed = {rank for _, _, wrong, _ in findings for rank in wrong}
    if not certain:
        blamed |= {rank for _, _, _, right in findings for rank in right}
        sentence += ", and no majority says which is right"
    return Verdict(
        step=step,
        ranks=tuple(sorted(blamed)),
        certain=certain,
        tensors=tensors,
        sentence=f"{sentence}: silent corruption",
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {' '.join(map(str, ranks))}"


def _spoken(name: str) -> str:
    section, _, rest = name.partition("/")
    if section == "optimizer":
        parameter, _, moment = rest.rpartition("/")
        return f"{moment} of {parameter}"
    return f"the EMA of {rest}" if section == "ema" else rest


def _leaves(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _boxes_key(name: str, tensor: Tensor) -> int:
    """Return a number that is the same for the same boxes of the same tensor."""
    boxes = [((0,) * tensor.ndim, tuple(tensor.shape))]
    if hasattr(tensor, "__create_chunk_list__"):
        chunks = tensor.__create_chunk_list__()  # pyright: ignore[reportAttributeAccessIssue]
        boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks)
    text = f"{name} {tensor.dtype} {boxes}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
