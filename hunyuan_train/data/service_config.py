"""The ``data.service`` section: encoder processes that feed training."""

import re
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class ServiceConfig:
    """Encoders of their own, for ``data.encode=service``."""

    processes: int = 0
    """Encoder processes that training starts on each of its machines, beside those that
    ``hunyuan-train serve`` started; they end with training."""
    devices: list[str] = field(default_factory=list)
    """Devices of these processes in turn, like [cuda:6, cuda:7] or [cpu]; empty: that of the first
    rank on the machine."""
    nice: int = 10
    """How far these processes step back from the processor for others, 0 to 19."""
    folder: str = ""
    """Shared folder in which encoders register, with the cache; empty: ``service`` in
    data.latents."""
    host: str = ""
    """Name or address under which other machines reach the encoder that ``hunyuan-train serve``
    starts; empty: the name of its machine."""
    in_flight: int = 8
    """Samples that a rank asks an encoder for before it has the first of them."""
    timeout_s: float = 300.0
    """Seconds an encoder may take from one answer to the next before it is given up."""
    silence_s: float = 15.0
    """Seconds without a sign of life, which comes every second, after which it is given up."""
    start_s: float = 600.0
    """Seconds training waits for the first encoder at its start before it encodes by itself."""
    fallback_s: float = 30.0
    """Seconds without any encoder after which a rank encodes by itself on its own device until one
    is there again; -1: it waits for one."""
    cache_gib: float = 8.0
    """Room for what encoders have made, in ``folder``; what was used least recently goes. 0 keeps
    nothing."""

    def __post_init__(self) -> None:
        """Reject values that cannot work, naming the field and the fix."""
        least = {"processes": 0, "nice": 0, "cache_gib": 0, "in_flight": 1, "timeout_s": 1,
                 "silence_s": 3, "start_s": 0}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(
                    f"data.service.{name}={value} is below {minimum}; set it to {minimum} or more"
                )
        for device in self.devices:
            if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
                raise ValueError(
                    f"data.service.devices entry {device} is no device; write cpu, cuda or cuda:6"
                )
        if self.nice > 19:
            raise ValueError(f"data.service.nice={self.nice} is above 19, the lowest priority")
        if self.fallback_s < 0 and self.fallback_s != -1:
            raise ValueError(
                f"data.service.fallback_s={self.fallback_s:g} is neither seconds nor -1 (wait)"
            )
