"""Comparing live tensors with the digests of a checkpoint, on all ranks together."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.checkpoint.load import FlatTensors, read_tensors
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.tensor_digest import (
    LANES,
    boxes,
    digest_box,
    digest_boxes,
    from_hex,
    to_hex,
)
from hunyuan_train.parallel.view import WholeView

_MAX_NAMED = 5


def check_digests(
    folder: Path, flat: FlatTensors, digests: Mapping[str, str], ranks: Ranks
) -> None:
    """Check that the tensors just restored from ``folder`` are, on every rank, what was saved.

    One small sum over ranks settles the usual case. Only if it does not fit, the ranks compare
    copies with each other and with the files, to name the tensor and the rank.

    Raises:
        ValueError: Some tensor is wrong somewhere; raised on every rank.
    """
    names = sorted(flat.keys() & digests.keys())
    held = torch.zeros(len(names), 1 + LANES, dtype=torch.int64)
    for row, name in enumerate(names):
        parts = boxes(flat[name])
        held[row, 0] = sum(box.numel() for box in parts.values())
        held[row, 1:] = digest_boxes(parts).cpu()
    ranks.sum(held)
    doubtful = [
        name for row, name in enumerate(names) if not _fits(held[row], flat[name], digests[name])
    ]
    wrong = [name for name in doubtful if not _copies_fit(flat[name], digests[name], ranks)]
    if not wrong:
        return
    found: list[str] = []
    for name in wrong[:_MAX_NAMED]:
        culprits = _differing_ranks(folder, name, flat[name], ranks)
        where = (
            f"on rank {', '.join(map(str, culprits))}" if culprits else "in the files themselves"
        )
        found.append(f"{name} {where}")
    more = f" and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
    raise ValueError(
        f"{folder} was restored wrongly: {len(wrong)} of {len(names)} tensors do not have the "
        f"digest they were saved with: {'; '.join(found)}{more}; start again, and test the memory "
        "of the machine if it happens again"
    )


def _fits(held: Tensor, tensor: Tensor, digest: str) -> bool:
    """Return whether all ranks' parts add up to as many digests as there are copies."""
    copies, rest = divmod(int(held[0]), max(tensor.numel(), 1))
    return rest == 0 and torch.equal(held[1:], from_hex(digest) * copies)


def _copies_fit(tensor: Tensor, digest: str, ranks: Ranks) -> bool:
    """Return the same of one tensor whose parts may be held by unequal numbers of ranks."""
    mine = {
        (offset, tuple(box.shape)): digest_box(box, offset).tolist()
        for offset, box in boxes(tensor).items()
    }
    once: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for theirs in ranks.gather(mine):
        for place, sums in theirs.items():
            if once.setdefault(place, sums) != sums:
                return False
    total = torch.tensor(list(once.values()), dtype=torch.int64).reshape(-1, LANES).sum(0)
    return to_hex(total) == digest


def _differing_ranks(folder: Path, name: str, tensor: Tensor, ranks: Ranks) -> list[int]:
    """Read a tensor once more and return the ranks whose live parts are not what they read."""
    live = boxes(tensor)
    again = {torch.Size(offset): torch.zeros_like(box) for offset, box in live.items()}
    if hasattr(tensor, "__create_chunk_list__"):
        like = next(iter(again.values()), torch.empty(0, dtype=tensor.dtype))
        target: Tensor = WholeView(tensor.shape, again, like)
    else:
        (target,) = again.values()
    read_tensors(folder, {name: target}, ranks)
    same = torch.equal(
        digest_boxes(live).cpu(),
        digest_boxes({tuple(offset): box for offset, box in again.items()}).cpu(),
    )
    return [rank for rank, good in enumerate(ranks.gather(same)) if not good]
