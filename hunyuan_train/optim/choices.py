"""Which choices of the sections memory, optimizer and parallel go together."""

from hunyuan_train.memory.config import AveragePlace, MemoryConfig, Place, StateType, WeightType
from hunyuan_train.optim.config import Implementation, OptimizerConfig, Rule
from hunyuan_train.parallel.config import ParallelConfig, ZeroEngine


def check_choices(
    memory: MemoryConfig, optimizer: OptimizerConfig, parallel: ParallelConfig, ranks: int
) -> None:
    """Check how weights, moments and their average are kept.

    Args:
        memory: The choices.
        optimizer: For its clipping.
        parallel: The layout.
        ranks: In the world.

    Raises:
        ValueError: naming the field, its value and what to change.
    """
    chosen = _chosen(memory)
    if chosen and parallel.zero_engine is ZeroEngine.deepspeed:
        raise ValueError(
            f"{chosen[0]} needs parallel.zero_engine=torch: DeepSpeed keeps its own states"
        )
    if chosen and parallel.compute_dtype == "float64":
        raise ValueError(
            f"{chosen[0]} cannot be combined with parallel.compute_dtype=float64, which keeps "
            "everything in float64; choose float32 or bfloat16"
        )
    _check_frozen(optimizer, parallel)
    _check_muon(chosen, optimizer, parallel)
    apex = optimizer.implementation is Implementation.apex
    states = [choice for choice in chosen if not choice.startswith("memory.ema")]
    if apex and (states or parallel.zero_engine is ZeroEngine.deepspeed):
        other = states[0] if states else "parallel.zero_engine=deepspeed"
        raise ValueError(
            f"optimizer.implementation=apex cannot be combined with {other}; choose auto or torch"
        )
    if memory.weights is WeightType.bfloat16 and parallel.compute_dtype != "bfloat16":
        raise ValueError(
            "memory.weights=bfloat16 computes in bfloat16, but parallel.compute_dtype="
            f"{parallel.compute_dtype}; set that to bfloat16 or memory.weights=float32"
        )
    for choice in chosen:
        if parallel.tp > 1 and choice.endswith(("int8", "host")):
            raise ValueError(
                f"{choice} is not offered with parallel.tp={parallel.tp}; set parallel.tp=1 and "
                "spread the model over more ranks with parallel.zero_stage=3"
            )
    if memory.fused_backward and optimizer.clip_norm:
        raise ValueError(
            f"memory.fused_backward=true updates before the norm of all gradients is known, so "
            f"optimizer.clip_norm={optimizer.clip_norm} cannot be kept; set it to 0"
        )
    if memory.fused_backward and ranks > 1:
        raise ValueError(
            f"memory.fused_backward=true is for a single rank, but there are {ranks}; "
            "set it to false"
        )


def _check_muon(chosen: list[str], optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
    """Check that Muon sees whole matrices and keeps its own state.

    Raises:
        ValueError: naming what it cannot be combined with.
    """
    if optimizer.rule is not Rule.muon:
        return
    other = [choice for choice in chosen if not choice.startswith("memory.ema")]
    if parallel.zero_engine is ZeroEngine.deepspeed:
        other.append("parallel.zero_engine=deepspeed")
    if parallel.tp > 1:
        other.append(f"parallel.tp={parallel.tp}")
    if optimizer.implementation is Implementation.apex:
        other.append("optimizer.implementation=apex")
    if other:
        raise ValueError(
            f"optimizer.rule=muon cannot be combined with {other[0]}; set optimizer.rule=adamw or "
            "leave the other at its default"
        )


def _check_frozen(optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
    """Check that the engine can leave parameters alone.

    Raises:
        ValueError: DeepSpeed updates flat ranges of many parameters, apex counts updates of all.
    """
    chosen = [name for name in ("trainable", "unfreeze") if getattr(optimizer, name)]
    if chosen and parallel.zero_engine is ZeroEngine.deepspeed:
        raise ValueError(
            f"optimizer.{chosen[0]}={getattr(optimizer, chosen[0])} leaves parameters alone, and "
            "DeepSpeed updates all in its flat buffers; set parallel.zero_engine=torch"
        )
    if optimizer.unfreeze and optimizer.implementation is Implementation.apex:
        raise ValueError(
            f"optimizer.unfreeze={optimizer.unfreeze} gives parameters different numbers of "
            "updates, and optimizer.implementation=apex counts one for all; choose auto or torch"
        )


def _chosen(memory: MemoryConfig) -> list[str]:
    """Return what is not as by default, as a config line would say it."""
    usual = (
        ("weights", memory.weights.value, WeightType.float32.value),
        ("optimizer_states", memory.optimizer_states.value, StateType.float32.value),
        ("optimizer_device", memory.optimizer_device.value, Place.device.value),
        ("fused_backward", str(memory.fused_backward).lower(), "false"),
        ("ema", memory.ema.value, AveragePlace.device.value),
    )
    return [f"memory.{name}={value}" for name, value, default in usual if value != default]


ONE_MICRO_STEP = (
    "memory.fused_backward=true updates in every backward, but this update has several "
    "micro-steps; set stage.micro_steps=1, data.global_samples=0 and data.global_tokens=0"
)
