"""The device a process computes on, and the few calls that differ between devices."""

import torch


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into this process's device.

    Raises:
        ValueError: if CUDA is asked for and this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "run.device=cuda, but torch sees no CUDA device here; "
                "use run.device=cpu or install a CUDA build of torch"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    raise ValueError(f"run.device={name} is not a device; choose from auto cpu cuda")


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work, so that a clock read after it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: of the device on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
