"""Config section of the machines a run is planned for; a run itself reads its own devices."""

from dataclasses import dataclass, field

_WITH_TORCH = ("cudnn", "flash", "efficient")

_H100 = {"cudnn": [618.0, 534.0]}


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Nodes of equal GPUs: what they hold, compute and move. Bandwidths are of one direction."""

    gpu: str = "H100"
    """Name of the GPU, as part of what the driver calls it."""

    nodes: int = 1
    """Machines."""

    gpus_per_node: int = 8
    """GPUs of one machine, joined by NVLink."""

    memory_gib: float = 79.2
    """Memory of one GPU that a process can allocate."""

    host_gib: float = 1024.0
    """Memory of one machine that its processes share."""

    context_gib: float = 1.5
    """Of the GPU's memory for the CUDA context, libraries' workspaces and NCCL's buffers."""

    fragmentation: float = 0.05
    """Share of the GPU's memory that is left for gaps between allocations."""

    peak_tflops: float = 989.4
    """Dense bfloat16 peak of one GPU in the data sheet, in TFLOP/s."""

    measured_peak_tflops: float = 0.0
    """The same of a measured matrix product; 0 is not measured. MFU is against it when given."""

    gemm_efficiency: float = 0.66
    """Share of the data sheet's peak that matrix products of the model reach."""

    attention_tflops: dict[str, list[float]] = field(default_factory=dict)
    """Per kernel of memory.attention, TFLOP/s of forward and of backward over all keys at head size
    128; a backward counts 2.5 times the forward's FLOPs. Empty: cuDNN's of an H100."""

    hbm_gbs: float = 3350.0
    """Bandwidth of the GPU's memory, GB/s."""

    hbm_efficiency: float = 0.8
    """Share of it that elementwise kernels reach."""

    nvlink_gbs: float = 450.0
    """Bandwidth of one GPU to the others of its node, GB/s."""

    network_gbs: float = 50.0
    """Bandwidth of one GPU to other nodes, GB/s."""

    host_gbs: float = 25.0
    """Bandwidth of one GPU to the memory of its host while its neighbours use theirs, GB/s."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be at least 1")
        for name in (
            "memory_gib", "host_gib", "peak_tflops", "hbm_gbs", "nvlink_gbs", "network_gbs",
            "host_gbs",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be above 0")
        for name in ("gemm_efficiency", "hbm_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be in (0, 1]")
        if not 0 <= self.fragmentation < 1:
            raise ValueError(f"cluster.fragmentation={self.fragmentation} must be in [0, 1)")
        for kernel, rates in self.attention_tflops.items():
            if len(rates) != 2 or min(rates) <= 0:
                raise ValueError(
                    f"cluster.attention_tflops.{kernel}={rates} must be two numbers above 0: "
                    "TFLOP/s of forward and of backward"
                )

    @property
    def world(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def memory_bytes(self) -> float:
        """Memory of one GPU."""
        return self.memory_gib * 2**30

    @property
    def reserve_bytes(self) -> float:
        """What is left free of it: context and gaps."""
        return self.context_gib * 2**30 + self.fragmentation * self.memory_bytes

    def attention_rates(self, kernel: str) -> tuple[float, float]:
        """Return FLOP/s of forward and backward of ``kernel``.

        "auto" is the fastest of those that come with torch, or of all if none does.

        Raises:
            ValueError: the table does not have the kernel.
        """
        table = self.attention_tflops or _H100
        if kernel == "auto":
            at_hand = [name for name in table if name in _WITH_TORCH] or list(table)
            # One forward of F FLOPs and one backward of 2.5 F.
            kernel = min(at_hand, key=lambda name: 1 / table[name][0] + 2.5 / table[name][1])
        if kernel not in table:
            raise ValueError(
                f"memory.attention={kernel} has no rates in cluster.attention_tflops; choose "
                f"{' '.join(sorted(table))} or auto"
            )
        forward, backward = table[kernel]
        return forward * 1e12, backward * 1e12
