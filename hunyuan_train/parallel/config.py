"""How the work is laid out over ranks."""

from dataclasses import dataclass
from enum import StrEnum


class ZeroEngine(StrEnum):
    """Who shards parameters, gradients and optimizer state over data-parallel ranks."""

    torch = "torch"
    deepspeed = "deepspeed"


class TensorEngine(StrEnum):
    """Whose linears do tensor parallelism."""

    native = "native"
    megatron = "megatron"


class Offload(StrEnum):
    """Where the optimizer state lives and is updated."""

    none = "none"
    cpu = "cpu"


class ReduceEvery(StrEnum):
    """How often gradients are reduced over ranks."""

    auto = "auto"
    step = "step"
    micro_step = "micro_step"


class VaeSplit(StrEnum):
    """Along what the autoencoder cuts a clip that several ranks share."""

    frames = "frames"
    height = "height"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Layout of one run. ``dp_shard`` is what the other axes leave of the world size."""

    tp: int = 1
    """Tensor-parallel ranks: heads, hidden units and modulation channels are divided over them."""

    sp: bool = False
    """Sequence parallelism inside tp: norms, gates and residuals work on sequence shards."""

    cp_ring: int = 1
    """Context-parallel ranks that pass keys and values round a ring."""

    cp_ulysses: int = 1
    """Context-parallel ranks that trade sequence for heads by all-to-all, inside each ring rank."""

    vae_split: VaeSplit = VaeSplit.height
    """Along what the cp ranks cut a clip where the VAE is trained: height, or frames, which leaves
    no part of an image to most ranks."""

    dp_replicate: int = 1
    """Replicas of the sharded group (HSDP)."""

    zero_stage: int = 3
    """What is sharded over dp_shard x cp: 0 nothing (gradients are added up, for small models), 1
    the optimizer, 2 gradients too, gathered parameters kept from forward to backward, 3 parameters
    too."""

    zero_engine: ZeroEngine = ZeroEngine.torch
    """torch (fully_shard) or deepspeed (needs the extra of that name)."""

    tensor_engine: TensorEngine = TensorEngine.native
    """native, or megatron (column and row linears of megatron-core; needs the extra)."""

    offload_optimizer: Offload = Offload.none
    """Keep optimizer state and update on the CPU; with zero_engine=deepspeed."""

    reduce_every: ReduceEvery = ReduceEvery.auto
    """step adds whole gradients up on each rank and reduces once an update; micro_step (zero_stage
    2 and 3) reduces after every backward, so that only gradient shards are kept in between. auto is
    step, and with zero_engine=deepspeed what its stage does: step in 1, micro_step in 2 and 3."""

    compute_dtype: str = "float32"
    """Dtype of parameters and activations in forward and backward: float32, bfloat16, or float64
    to prove a layout (weights and optimizer are float64 then, too)."""

    reduce_dtype: str = "float32"
    """Dtype in which gradients are reduced over ranks: float32 or bfloat16."""

    timeout_s: float = 1800.0
    """Seconds a collective may take before the run stops."""

    @property
    def cp(self) -> int:
        """Ranks one sequence is spread over by context parallelism."""
        return self.cp_ring * self.cp_ulysses

    @property
    def sequence_shards(self) -> int:
        """Shards each token stream is cut into."""
        return self.cp * (self.tp if self.sp else 1)

    def __post_init__(self) -> None:
        """Check single fields and the combinations that need nothing but this section.

        Raises:
            ValueError: naming the field, its value and the values that work.
        """
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"parallel.zero_stage={self.zero_stage} is unknown; choose 0 1 2 3")
        for axis in ("tp", "cp_ring", "cp_ulysses", "dp_replicate"):
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis}={getattr(self, axis)} must be at least 1")
        if self.sp and self.tp == 1:
            raise ValueError(
                "parallel.sp=true works inside tensor parallelism, but parallel.tp=1; "
                "set parallel.tp above 1 or parallel.sp=false"
            )
        for field, known in (
            ("compute_dtype", ("float32", "bfloat16", "float64")),
            ("reduce_dtype", ("float32", "bfloat16")),
        ):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"parallel.{field}={value} is unknown; choose {' '.join(known)}")
        self._check_zero()

    def _check_zero(self) -> None:
        if self.zero_stage == 0 and self.compute_dtype == "bfloat16":
            raise ValueError(
                f"parallel.zero_stage=0 keeps no float32 master weights, so it cannot be combined "
                f"with parallel.compute_dtype={self.compute_dtype}; choose zero_stage 1 2 3"
            )
        if self.reduce_every is ReduceEvery.micro_step and self.zero_stage < 2:
            raise ValueError(
                f"parallel.reduce_every=micro_step keeps gradient shards, which "
                f"parallel.zero_stage={self.zero_stage} does not have; choose zero_stage 2 3"
            )
        if self.zero_engine is ZeroEngine.deepspeed:
            if self.compute_dtype == "float64":
                raise ValueError(
                    "parallel.compute_dtype=float64 is not offered with "
                    "parallel.zero_engine=deepspeed; choose float32 bfloat16"
                )
            fitting = ReduceEvery.micro_step if self.zero_stage > 1 else ReduceEvery.step
            if self.reduce_every not in (ReduceEvery.auto, fitting):
                raise ValueError(
                    f"parallel.reduce_every={self.reduce_every.value} is not what "
                    f"parallel.zero_engine=deepspeed does in parallel.zero_stage={self.zero_stage};"
                    f" choose auto {fitting.value}"
                )
            if self.zero_stage == 0:
                raise ValueError(
                    "parallel.zero_engine=deepspeed shards at least the optimizer; choose "
                    "parallel.zero_stage 1 2 3, or zero_engine=torch for stage 0"
                )
            if self.dp_replicate > 1:
                raise ValueError(
                    f"parallel.dp_replicate={self.dp_replicate} (HSDP) is not offered with "
                    "parallel.zero_engine=deepspeed; choose dp_replicate=1 or zero_engine=torch"
                )
        elif self.offload_optimizer is Offload.cpu:
            raise ValueError(
                "parallel.offload_optimizer=cpu needs parallel.zero_engine=deepspeed; "
                "set it, or offload_optimizer=none"
            )
