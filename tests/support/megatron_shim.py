"""What Megatron-Core needs to run its sequence parallelism without a GPU; for tests only."""

import torch


def run_megatron_on_cpu() -> None:
    """Answer the two questions about a GPU that its linears ask; lasts as long as the process."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # only used as device=
    torch.cuda.synchronize = lambda *_, **__: None
