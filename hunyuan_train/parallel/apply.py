"""The order in which a single-device model becomes a distributed one."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from hunyuan_train.memory.compiling import apply_compile
from hunyuan_train.memory.config import MemoryConfig, WeightType
from hunyuan_train.memory.recompute import apply_recompute
from hunyuan_train.models.spec import ShardingPlan
from hunyuan_train.parallel.config import ParallelConfig, ZeroEngine
from hunyuan_train.parallel.layout import Slices
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.parallel.sequence import ShardedTokens
from hunyuan_train.parallel.tensor import apply_tensor
from hunyuan_train.parallel.ulysses import ContextCore
from hunyuan_train.parallel.view import WholeView
from hunyuan_train.parallel.zero import apply_zero


@dataclass(frozen=True, slots=True)
class ParallelModel:
    """A model laid out over ranks, and what its shards are shards of."""

    module: nn.Module
    axes: Axes
    slices: dict[str, Slices]
    """The part of the whole that each tensor-parallel parameter is, by name; others are whole."""
    partial: frozenset[str]
    """Parameters whose gradients have to be added up over tensor-parallel ranks."""

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor like this rank's part of parameter ``name`` as a checkpoint sees it.

        That is boxes of the whole where tensor parallelism cut it, else the tensor itself.
        """
        slices = self.slices.get(name)
        return tensor if slices is None or tensor.dim() == 0 else WholeView.of(tensor, slices)


def parallelize(
    model: nn.Module,
    plan: ShardingPlan,
    axes: Axes,
    cfg: ParallelConfig,
    memory: MemoryConfig | None = None,
) -> ParallelModel:
    """Apply the layout to a single-device ``model`` in place, in the order of the lines below.

    Without ``memory`` blocks keep for their backward all that autograd saves.

    Raises:
        ValueError: heads or hidden units cannot be divided so, options exclude each other, or a
            package is missing.
    """
    check_divisors(plan, cfg)
    check_recompute(memory, cfg)
    check_compile(memory, cfg)
    if memory is not None and memory.weights is WeightType.bfloat16:
        model.bfloat16()
    slices, partial = apply_tensor(model, plan, axes, cfg)
    apply_context(model, plan, axes)
    if memory is not None:
        apply_compile(model, plan, memory)
        apply_recompute(model, plan, memory)
    if cfg.zero_engine is ZeroEngine.torch:
        apply_zero(model, plan, axes, cfg)
    return ParallelModel(model, axes, slices, partial)


def apply_context(model: nn.Module, plan: ShardingPlan, axes: Axes) -> None:
    """Install sequence-sharded token streams and the attention that spans them.

    The attention of one device is replaced too, by the seam at which its kernel is chosen and its
    results can be kept.
    """
    tokens = ShardedTokens(axes)
    for name in plan.token_modules if tokens.shards > 1 else ():
        model.get_submodule(name).tokens = tokens  # pyright: ignore[reportArgumentType]
    core = ContextCore(
        axes.group("cp_ring") if axes.size("cp_ring") > 1 else None,
        axes.group("cp_ulysses") if axes.size("cp_ulysses") > 1 else None,
    )
    for name, module in model.named_modules():
        if hasattr(module, "core") and any(fnmatchcase(name, p) for p in plan.core_modules):
            module.core = core


def check_recompute(memory: MemoryConfig | None, cfg: ParallelConfig) -> None:
    """Check that ranks with different buckets gather the same weights equally often.

    Raises:
        ValueError: DeepSpeed's stage 3, which gathers in every run of a linear, and several modes.
    """
    if memory is None or cfg.zero_engine is not ZeroEngine.deepspeed or cfg.zero_stage < 3:
        return
    if not {memory.recompute.value}.issuperset(memory.recompute_of.values()):
        raise ValueError(
            f"memory.recompute_of={memory.recompute_of} beside memory.recompute="
            f"{memory.recompute.value} needs parallel.zero_engine=torch or a zero_stage below 3: "
            "with DeepSpeed's stage 3 all ranks do the same; leave memory.recompute_of empty"
        )


def check_compile(memory: MemoryConfig | None, cfg: ParallelConfig) -> None:
    """Check that nothing inside a block sends or gathers but its attention core.

    Raises:
        ValueError: the linears of tensor parallelism, or of DeepSpeed's stage 3.
    """
    if memory is None or not memory.compile:
        return
    if cfg.tp > 1:
        raise ValueError(
            f"memory.compile=true cannot compile linears that send, as with parallel.tp={cfg.tp}; "
            "set memory.compile=false, or parallel.tp=1 and cut the sequence instead"
        )
    if cfg.zero_engine is ZeroEngine.deepspeed and cfg.zero_stage == 3:
        raise ValueError(
            "memory.compile=true cannot compile linears that are gathered one by one, as with "
            "parallel.zero_engine=deepspeed and parallel.zero_stage=3; set memory.compile=false "
            "or parallel.zero_engine=torch"
        )


def check_sequence(tokens: Mapping[str, int], cfg: ParallelConfig) -> None:
    """Check that no sequence has fewer image tokens than it has shards.

    Args:
        tokens: image tokens of one sample, by the name of its bucket.
        cfg: the layout.

    Raises:
        ValueError: naming the bucket, its tokens and the numbers of shards that work.
    """
    bucket, fewest = min(tokens.items(), key=lambda item: item[1])
    if fewest < cfg.sequence_shards:
        tp = f" * parallel.tp={cfg.tp}" if cfg.sp else ""
        raise ValueError(
            f"parallel.cp_ring={cfg.cp_ring} * parallel.cp_ulysses={cfg.cp_ulysses}{tp} cuts a "
            f"sequence into {cfg.sequence_shards}, but bucket {bucket} has {fewest} image tokens; "
            f"choose a product up to {fewest}, or leave such small buckets out"
        )


def check_divisors(plan: ShardingPlan, cfg: ParallelConfig) -> None:
    """Check that tensor-parallel and Ulysses ranks divide what they share.

    Raises:
        ValueError: naming the fields, their values and the ones that work.
    """
    field, heads = plan.divisors[0]
    share = cfg.tp * cfg.cp_ulysses
    if heads % share:
        choices = " ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"parallel.tp={cfg.tp} * parallel.cp_ulysses={cfg.cp_ulysses} is {share}, which does "
            f"not divide {field}={heads}; choose a product from {choices}"
        )
    for field, value in plan.divisors[1:]:
        if value % cfg.tp:
            choices = [n for n in range(1, heads + 1) if heads % n == 0 and value % n == 0]
            raise ValueError(
                f"parallel.tp={cfg.tp} does not divide {field}={value}; "
                f"choose from {' '.join(str(n) for n in choices)}"
            )
