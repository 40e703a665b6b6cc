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


class WeightType(StrEnum):
    """What the trained weights are kept in between updates."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class StateType(StrEnum):
    """What the moments of AdamW are kept in between updates."""

    float32 = "float32"
    int8 = "int8"


class Place(StrEnum):
    """Where something is kept between updates."""

    device = "device"
    host = "host"


class AveragePlace(StrEnum):
    """Where the moving average of the weights is kept, if there is one."""

    device = "device"
    host = "host"
    off = "off"


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """What is kept, recomputed or moved to the host, and which kernels compute it."""

    recompute: Recompute = Recompute.auto
    """none keeps everything, selective keeps block inputs, attention outputs and log-sum-exps and
    computes the linears again, full keeps block inputs alone; auto is the least that fits the
    device, bucket by bucket."""

    recompute_of: dict[str, str] = field(default_factory=dict)
    """Recompute of single buckets, like {129x720x1280: full}; wins over recompute."""

    check_fit: bool = True
    """Refuse buckets that by the estimate do not fit; false warns, and keeps as little of them as
    recompute and offload allow."""

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

    weights: WeightType = WeightType.float32
    """bfloat16 keeps no float32 weights: updates are rounded up or down at random, in proportion,
    and so are right on average; the random numbers depend on seed, parameter, position and update
    alone."""

    optimizer_states: StateType = StateType.float32
    """int8 keeps the moments of matrices as 8-bit codes with a scale per 256 values, a quarter of
    float32."""

    optimizer_device: Place = Place.device
    """host keeps the moments in pinned memory; an update brings them to the device and back, piece
    by piece, and computes the same numbers."""

    fused_backward: bool = False
    """Update every parameter inside the backward, as soon as its gradient is there, and free that.
    On one rank, with one micro-step per update and optimizer.clip_norm=0."""

    ema: AveragePlace = AveragePlace.device
    """The float32 moving average of the weights: on the device, in pinned memory of the host, or
    off; then checkpoints have none and readers take the weights themselves."""

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
