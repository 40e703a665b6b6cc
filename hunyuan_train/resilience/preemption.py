"""Preemption: a signal asks for a checkpoint and an early end, and all ranks agree on the step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.signals import SignalHandler


class Preemption(SignalHandler):
    """Catches the signals of ``cfg`` between entering and leaving; a context manager.

    A signal reaches the ranks at different moments. Acting on the local flag would let one rank
    save while another starts the next step, so the loop asks for the agreed answer: either
    :meth:`requested` (one small all-reduce), or :meth:`local_flag` added to a reduction that
    happens anyway, followed by :meth:`agree`.
    """

    def __init__(self, cfg: ResilienceConfig, group: dist.ProcessGroup | None = None) -> None:
        """Prepare.

        Args:
            cfg: Names the signals.
            group: Group that :meth:`requested` reduces over, best one with a CPU backend; None is
                the default group.
        """
        super().__init__(cfg.preemption_signals)
        self._group = group
        self._received: str | None = None
        self._agreed = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Set a flag, no more: this may interrupt a line that holds the logging lock."""
        self._received = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """The signal this rank received, or "another rank" if only others did; "" if none."""
        return self._received or ("another rank" if self._agreed else "")

    def local_flag(self) -> float:
        """Return 1.0 if this rank was asked to stop, else 0.0. No communication."""
        return float(self._received is not None)

    def agree(self, reduced: Tensor | float) -> bool:
        """Take the sum or maximum of all local flags as the answer; it stays True once it was.

        Args:
            reduced: :meth:`local_flag` of every rank, reduced. A device tensor is read here (a host
                sync).
        """
        self._agreed = self._agreed or float(reduced) > 0
        return self._agreed

    def requested(self) -> bool:
        """Return whether any rank was asked to stop; every rank must call it at the same step."""
        if self._agreed:
            return True
        if not dist.is_initialized():
            return self.agree(self.local_flag())
        # A group with any CPU backend answers without waiting for the accelerator.
        device = "cpu" if "cpu:" in str(dist.get_backend_config(self._group)) else "cuda"
        flag = torch.tensor([self.local_flag()], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return self.agree(flag)
