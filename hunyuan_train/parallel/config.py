"""How the work is laid out over ranks."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Layout of one run; ``dp_shard`` follows from the world size."""

    zero_stage: int = 3
    """0 keeps everything on every rank and averages gradients, for small models; 2 shards and keeps
    gathered parameters from forward to backward; 3 frees and gathers them again."""

    dp_replicate: int = 1
    """Replicas of the sharded group (HSDP); must divide the world size."""

    compute_dtype: str = "float32"
    """Dtype of parameters and activations in forward and backward: float32 or bfloat16."""

    reduce_dtype: str = "float32"
    """Dtype in which gradients are reduced over ranks: float32 or bfloat16."""

    timeout_s: float = 1800.0
    """Seconds a collective may take before the run stops."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field, its value and the values that work.
        """
        if self.zero_stage not in (0, 2, 3):
            raise ValueError(f"parallel.zero_stage={self.zero_stage} is unknown; choose 0, 2 or 3")
        if self.dp_replicate < 1:
            raise ValueError(f"parallel.dp_replicate={self.dp_replicate} must be at least 1")
        for field in ("compute_dtype", "reduce_dtype"):
            if (value := getattr(self, field)) not in ("float32", "bfloat16"):
                raise ValueError(f"parallel.{field}={value} is unknown; choose float32 or bfloat16")
        if self.zero_stage == 0 and self.compute_dtype != "float32":
            raise ValueError(
                f"parallel.zero_stage=0 keeps no float32 master weights, so it cannot be combined "
                f"with parallel.compute_dtype={self.compute_dtype}; choose zero_stage 2 or 3"
            )
