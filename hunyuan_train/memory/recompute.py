"""What a block keeps for its backward: everything, its attention, or its input alone.

| mode | kept from forward to backward | done again in the backward |
|---|---|---|
| none | all that autograd saves | nothing |
| selective | block input, attention output and log-sum-exp | linears, norms, rotations, exchanges |
| full | block input | the whole block, hops of a ring included |

The second run of a block is that of ``torch.utils.checkpoint``. With selective, output and
log-sum-exp of its attention (``models.kept``) are set aside in the first run and handed out in the
second, so no kernel and no hop of a ring runs twice. Nothing is random in a block, so both runs
give the same bits and gradients do not change.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from hunyuan_train.memory.config import MemoryConfig, Recompute, Switch
from hunyuan_train.memory.offload import Offload
from hunyuan_train.models.kept import keeping
from hunyuan_train.models.spec import ShardingPlan


class _Keeper:
    """What the attention of one block returned in one forward; see ``models.kept``."""

    def __init__(self) -> None:
        self._first: list[tuple[Tensor, ...]] = []
        self._sizes: list[int] = []
        self._saver: Any = None
        self._again: Iterator[Tensor] | None = None
        self._calls = 0

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what the first and the second run of the block happen in."""
        return keeping(self), _SecondRun(self)

    def start_again(self) -> None:
        """Begin a second run."""
        self._again, self._calls = iter(self._saver.saved_tensors), 0

    def results(self, run: Callable[[], tuple[Tensor, ...]]) -> Any:
        """Run and remember, or remember."""
        if self._again is None:
            found = run()
            # What is returned gets a history, which would keep the graph of the block alive.
            self._first.append(tuple(tensor.detach() for tensor in found))
            return found
        self._calls += 1
        return tuple(t.detach() for t in islice(self._again, self._sizes[self._calls - 1]))

    def set_aside(self) -> None:
        """Give what is remembered to autograd, so that its hooks see it like all that is saved."""
        self._sizes = [len(found) for found in self._first]
        assert self._sizes, "no attention of this block calls kept(), so selective keeps nothing"
        anchor = torch.empty(0, requires_grad=True)
        self._saver = _Saver.apply(anchor, *chain.from_iterable(self._first)).grad_fn
        self._first.clear()


class _SecondRun:
    """The context of a second run; a graph that is kept may need it more than once."""

    def __init__(self, keeper: _Keeper) -> None:
        self._keeper = keeper

    def __enter__(self) -> None:
        self._keeper.start_again()
        self._inner = keeping(self._keeper)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)


class _Saver(torch.autograd.Function):
    """Holds tensors as saved ones; it is in no graph, so its backward never runs."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise AssertionError("what is set aside has no gradient")


class BlockForward:
    """Stands in for ``forward`` of a block, which it runs in the mode that is set.

    Args:
        forward: the block's own, compiled or not.
        index: number of the block in a forward.
        offload: who moves what is kept to the host, if anybody does.
    """

    def __init__(self, forward: Callable[..., Any], index: int, offload: Offload | None) -> None:
        self.forward, self.index, self.offload = forward, index, offload
        self.mode = Recompute.none
        self.moves = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if self.mode is Recompute.none or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        keeper = _Keeper() if self.mode is Recompute.selective else None
        offload = self.offload if self.moves else None
        with nullcontext() if offload is None else offload.of_block(self.index):
            out = checkpoint(
                self.forward,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a block is random
                context_fn=noop_context_fn if keeper is None else keeper.contexts,
                **kwargs,
            )
            if keeper is not None:
                keeper.set_aside()
        return out


def apply_recompute(model: nn.Module, plan: ShardingPlan, memory: MemoryConfig) -> None:
    """Let :func:`set_recompute` choose what each repeated block with an attention core keeps.

    Only ``forward`` of a block is replaced, so parameters keep their names, and hooks that gather
    or release its weights (``fully_shard``, applied later) run once per pass, around both runs.
    Whatever else replaces ``forward``, like compilation, has to come before.
    """
    blocks = [
        model.get_submodule(name)
        for name in plan.units
        if any(fnmatchcase(name, pattern) for pattern in plan.core_modules)
    ]
    offload = None
    if memory.offload is not Switch.off:
        min_bytes = memory.offload_min_mib * 2**20
        offload = Offload(len(blocks), memory.offload_share, min_bytes)
    for index, block in enumerate(blocks):
        block.forward = BlockForward(block.forward, index, offload)


def set_recompute(model: nn.Module, mode: Recompute, offload: bool = True) -> None:
    """Choose what the blocks keep in the forwards from now on; call it before a micro-step.

    A backward does what the mode of its forward was. Ranks with different micro-batches may differ
    with ``fully_shard``, whose gathers do not depend on the mode.

    Args:
        model: as ``apply_recompute`` left it; anything else can only keep everything.
        mode: none, selective or full.
        offload: whether what is kept may be moved to the host meanwhile; only with
            ``memory.offload``.
    """
    assert mode is not Recompute.auto, "auto is resolved by mode_of"
    found = 0
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, BlockForward):
            forward.mode, forward.moves = mode, offload
            found += 1
    assert found or mode is Recompute.none, f"no block of this model can do {mode.value}"


@dataclass(frozen=True, slots=True)
class BucketMode:
    """How the activations of one bucket's micro-batches are kept."""

    recompute: Recompute
    offload: bool
    """Whether what is kept may be moved to the host meanwhile."""

    @classmethod
    def of(cls, memory: MemoryConfig, bucket: str) -> Self:
        """Return what ``memory`` says where nothing has been planned; ``auto`` keeps everything."""
        return cls(mode_of(memory, bucket), memory.offload is Switch.on)


def mode_of(
    memory: MemoryConfig, bucket: str, fits: Callable[[Recompute], bool] = lambda mode: True
) -> Recompute:
    """Return what blocks keep of a micro-batch of ``bucket``.

    Args:
        memory: ``recompute_of`` wins over ``recompute``.
        bucket: its name, like 129x720x1280.
        fits: whether the micro-batch fits the device in a mode; ``auto`` is the first of none,
            selective and full that does, and full if none does.
    """
    mode = Recompute(memory.recompute_of.get(bucket, memory.recompute))
    if mode is not Recompute.auto:
        return mode
    return next((m for m in (Recompute.none, Recompute.selective) if fits(m)), Recompute.full)
