"""Options of what is kept in memory between forward and backward, and of the kernels that run."""

from dataclasses import dataclass, field
from enum import StrEnum


class Recompute(StrEnum):
    """What a block keeps for its backward."""

    auto = "auto"
    none = "none"
    selective = "selective"
    full = "full"


class Switch(StrEnum):
    """Whether something is used."""

    auto = "auto"
    on = "on"
    off = "off"


class AttentionKernel(StrEnum):
    """Which attention kernel runs."""

    auto = "auto"
    flash4 = "flash4"
    flash3 = "flash3"
    flash2 = "flash2"
    cudnn = "cudnn"
    flash = "flash"
    efficient = "efficient"
    cpu = "cpu"
    reference = "reference"


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """What is kept, recomputed or moved to the host, and which kernels compute it."""

    recompute: Recompute = Recompute.auto
    """none keeps everything, selective keeps block inputs, attention outputs and log-sum-exps and
    computes the linears again, full keeps block inputs alone; auto is the least that fits the
    device, bucket by bucket."""

    recompute_of: dict[str, str] = field(default_factory=dict)
    """Recompute of single buckets, like {129x720x1280: full}; wins over recompute."""

    offload: Switch = Switch.off
    """Move what selective and full recompute keep to the host between forward and backward; auto
    where it does not fit otherwise."""

    offload_share: float = 1.0
    """Share of the blocks whose kept tensors are moved."""

    offload_min_mib: float = 1.0
    """Kept tensors smaller than this stay on the device."""

    attention: AttentionKernel = AttentionKernel.auto
    """Attention kernel; auto measures those that are there at the start and takes the fastest."""

    kernels: Switch = Switch.auto
    """Fused Triton kernels; auto uses on CUDA those that were measured to pay."""

    compile: bool = False
    """torch.compile of every block, its attention left as it is."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field, its value and the values that work.
        """
        if not 0 < self.offload_share <= 1:
            raise ValueError(f"memory.offload_share={self.offload_share} must be in (0, 1]")
        if self.offload_min_mib < 0:
            raise ValueError(f"memory.offload_min_mib={self.offload_min_mib} must be 0 or more")
        known = [mode.value for mode in Recompute if mode is not Recompute.auto]
        for bucket, mode in self.recompute_of.items():
            if mode not in known:
                raise ValueError(
                    f"memory.recompute_of has {bucket}: {mode!r}; choose {' '.join(known)}"
                )
