"""torch.compile of every repeated block, its attention left as it is.

All blocks of a class share one compiled function with symbolic sizes, so neither a further block
nor a further bucket compiles anything. A block breaks once, at its attention core, which is not
looked into: it may send, and it may hand out what an earlier run kept (``models.kept``).

| graphs of a class of blocks | why |
|---|---|
| before the core, after it | the break |
| micro-batches of one sample, of several | torch.compile takes 1 for a constant, as do the norms |

That is ``GRAPHS`` each, forward and backward, and as many again for micro-batches with given frames
that replace tokens. Masks would double them; they go round the compiled
code. Without gradients, as in validation and sampling, blocks run uncompiled, which would double
them too.
"""

import inspect
import threading
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config

from hunyuan_train.memory.config import MemoryConfig
from hunyuan_train.models.attention import AttentionCore
from hunyuan_train.models.shapes import Heads, JointTokens
from hunyuan_train.models.spec import ShardingPlan

GRAPHS = 4
"""The most graphs a class of blocks is compiled to, without given frames."""


class _Held(threading.local):
    """The mask of the block this thread is in: the backward of a GPU has a thread of its own."""

    key_mask: Any = None


_held = _Held()


class OpaqueCore(nn.Module):
    """An attention core that compiled code calls and does not see into, nor its mask."""

    def __init__(self, core: AttentionCore) -> None:
        super().__init__()
        self.core = core

    @torch.compiler.disable()
    def forward(self, q: Heads, k: Heads, v: Heads, key_mask: Any) -> JointTokens:
        """Attend; the mask is the one that the block was called with."""
        assert key_mask is None, "a compiled block gets no mask"
        return apart(self.core(q, k, v, _held.key_mask))


class _Apart(torch.autograd.Function):
    """Identity whose result is no view; see ``apart``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return grad_outputs[0]


def apart(x: Any) -> Any:
    """Return a tensor that has no base, anything else as it is.

    Compiled code is only for views of a base of the same kind and layout, or for none, so a slice
    here and a whole tensor there would compile it twice.
    """
    return _Apart.apply(x) if isinstance(x, Tensor) and x._is_view() else x


class CompiledForward:
    """Stands in for ``forward`` of a block.

    Args:
        block: the block.
        compiled: ``forward`` of its class, compiled.
    """

    def __init__(self, block: nn.Module, compiled: Callable[..., Any]) -> None:
        self._block, self._eager, self._compiled = block, block.forward, compiled
        self._place = list(inspect.signature(block.forward).parameters).index("key_mask")

    def __call__(self, *args: Any) -> Any:
        """Run the block; arguments by position."""
        outer, _held.key_mask = _held.key_mask, args[self._place]
        rest = (*args[: self._place], None, *args[self._place + 1 :])
        try:
            if not torch.is_grad_enabled():
                return self._eager(*rest)
            # Else sizes that are equal by chance in the first batch must be so in all others.
            with shape_config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
                return self._compiled(self._block, *map(apart, rest))
        finally:
            _held.key_mask = outer


def apply_compile(
    model: nn.Module,
    plan: ShardingPlan,
    memory: MemoryConfig,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compile each repeated block with an attention core, with ``memory.compile``.

    Nothing is compiled before the first micro-batch. Call it when cores and linears have been
    replaced by those of the layout, and before ``apply_recompute``, whose second runs are then of
    the compiled code, and before ``fully_shard``, whose hooks stay outside of it.

    Args:
        model: with the attention and the linears of its layout.
        plan: names the blocks.
        memory: whether to compile.
        backend: of ``torch.compile``.
    """
    if not memory.compile:
        return
    compiled: dict[type, Callable[..., Any]] = {}
    for name in plan.units:
        if not any(fnmatchcase(name, pattern) for pattern in plan.core_modules):
            continue
        block = model.get_submodule(name)
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=True, backend=backend)
        block.core = OpaqueCore(block.core)  # pyright: ignore[reportArgumentType]
        block.forward = CompiledForward(block, compiled[kind])
