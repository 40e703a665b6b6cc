"""Metrics of a run: read from the device in one transfer, written by the first rank."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.observability.config import LoggingConfig
from hunyuan_train.observability.flops import Peak
from hunyuan_train.observability.trackers import JsonlTracker, Media, Tracker, build_trackers

Value = Tensor | float | int | str


def to_host(values: Mapping[str, Value]) -> dict[str, float | int | str]:
    """Return ``values`` with scalar tensors as floats, in one transfer (and wait) per device."""
    by_device: dict[torch.device, list[str]] = defaultdict(list)
    for name, value in values.items():
        if isinstance(value, Tensor):
            by_device[value.device].append(name)
    read: dict[str, float] = {}
    for names in by_device.values():
        # float64 holds every float32 and every count exactly.
        scalars = [torch.as_tensor(values[n]).detach().reshape(()).double() for n in names]
        read.update(zip(names, torch.stack(scalars).tolist(), strict=True))
    return {n: read[n] if isinstance(v, Tensor) else v for n, v in values.items()}


class MetricLogger:
    """Writes rows of metrics below a run folder.

    They go to ``metrics.jsonl``, to ``tensorboard/`` and, if asked for, to wandb.

    Only the first rank writes; on the others the methods do nothing. Build it after the checkpoint
    was restored.
    """

    def __init__(
        self,
        run_dir: str | Path,
        cfg: LoggingConfig,
        rank: int = 0,
        *,
        start_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the destinations.

        Args:
            run_dir: Folder of the run.
            cfg: Which destinations.
            rank: This process.
            start_step: Updates done by the restored checkpoint; rows after it are dropped, they
                will be written again.
            run_config: The whole configuration as plain values, shown by wandb.
        """
        self._trackers: list[Tracker] = (
            build_trackers(Path(run_dir), cfg, start_step, run_config or {}) if rank == 0 else []
        )

    def emit(self, step: int, values: Mapping[str, Value]) -> dict[str, float | int | str]:
        """Write one row and return it in Python numbers; ranks above 0 return {} and do not wait.

        Args:
            step: Updates done.
            values: Scalars; tensors may be on a device.
        """
        if not self._trackers:
            return {}
        row = to_host(values)
        for tracker in self._trackers:
            tracker.log(step, row)
        return row

    def show(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Write values that have a file of their own to the other destinations alone."""
        for tracker in self._trackers:
            if not isinstance(tracker, JsonlTracker):
                tracker.log(step, values)

    def media(self, step: int, items: Sequence[Media]) -> None:
        """Write pictures and videos; any thread may call it."""
        for tracker in self._trackers:
            tracker.media(step, items)

    def close(self) -> None:
        """Write out what is pending."""
        for tracker in self._trackers:
            tracker.close()


class Throughput:
    """Counts work since the last reading and turns it into rates."""

    def __init__(self, peak: Peak, world_size: int = 1) -> None:
        """Start the clock.

        Args:
            peak: Of one device.
            world_size: Devices that share the work counted by :meth:`add`.
        """
        self._peak = peak
        self._world_size = world_size
        self._reset()

    def _reset(self) -> None:
        self._started_s = time.perf_counter()
        self._steps, self._tokens, self._wait_s = 0, 0, 0.0
        self._flops = self._computed = 0.0

    def add(
        self, *, tokens: int, flops: float, computed_flops: float, data_wait_s: float = 0.0
    ) -> None:
        """Count one step.

        Args:
            tokens: Latent tokens of the step on all ranks.
            flops: Model FLOPs of the step on all ranks.
            computed_flops: Those and what was computed again.
            data_wait_s: Seconds this rank waited for its data.
        """
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._computed += computed_flops
        self._wait_s += data_wait_s

    def leave_out(self, seconds: float) -> None:
        """Do not count the last ``seconds``: they were not training."""
        self._started_s += seconds

    def take(self) -> dict[str, float]:
        """Return the rates since the last call and start again.

        Call it after the device was waited for, e.g. after the loss was read, or the time is that
        of the launches.

        Returns:
            ``step_s`` seconds per step, ``tokens_per_s`` over all ranks, ``tflops`` of the model
            per device, ``mfu`` that over the peak, ``hfu`` the same with what is computed again,
            both also over the measured peak (``mfu_measured``, ``hfu_measured``), and ``data_wait``
            the share of the time this rank waited for data.
        """
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        tflops, computed = (
            flops / elapsed_s / self._world_size / 1e12 for flops in (self._flops, self._computed)
        )
        sheet, measured = self._peak.tflops, self._peak.measured_tflops
        rates = {
            "step_s": elapsed_s / max(self._steps, 1),
            "tokens_per_s": self._tokens / elapsed_s,
            "tflops": tflops,
            "mfu": tflops / sheet,
            "mfu_measured": tflops / measured,
            "hfu": computed / sheet,
            "hfu_measured": computed / measured,
            "data_wait": self._wait_s / elapsed_s,
        }
        self._reset()
        return rates
