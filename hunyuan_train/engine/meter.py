"""Adds up the numbers of the steps between two log rows and writes the row."""

import time
from types import TracebackType

import torch
from torch import Tensor

from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.step import StepMetrics
from hunyuan_train.observability.flops import peak_tflops
from hunyuan_train.observability.metrics import MetricLogger
from hunyuan_train.observability.progress import ProgressLine
from hunyuan_train.runtime.device import peak_memory_bytes
from hunyuan_train.runtime.dist import max_over_ranks


class StepMeter:
    """Collects step metrics on the device and emits their means, with one transfer per row."""

    def __init__(self, run: TrainRun) -> None:
        self._run = run
        self._logger = MetricLogger(run.folder, run.cfg.logging, run.world.rank)
        self._logger.resume_at(run.state.step)
        self._progress = ProgressLine(
            run.cfg.stage.steps, run.cfg.logging, enabled=run.world.rank == 0, name=run.cfg.stage.name
        )
        self._peak_tflops = peak_tflops(run.world.device).tflops * run.world.size
        self._clear()

    def __enter__(self) -> "StepMeter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        self._logger.close()

    def _clear(self) -> None:
        self._steps: list[StepMetrics] = []
        self._waited_s = 0.0
        self._elapsed_s = 0.0

    def add(self, metrics: StepMetrics, waited_s: float, elapsed_s: float) -> None:
        """Add one step: its metrics, the seconds it waited for data and the seconds it took."""
        self._steps.append(metrics)
        self._waited_s += waited_s
        self._elapsed_s += elapsed_s

    def emit(self) -> None:
        """Write one row of means since the last one. Every rank calls this."""
        steps, state = self._steps, self._run.state
        if not steps:
            return
        memory = torch.tensor(float(peak_memory_bytes(self._run.world.device)))
        waited = torch.tensor(self._waited_s / self._elapsed_s)
        worst = max_over_ranks(torch.stack([memory, waited])).tolist()
        tflops = sum(s.flops for s in steps) / self._elapsed_s / 1e12
        row: dict[str, float | Tensor] = {
            "loss": torch.stack([s.loss for s in steps]).mean(),
            "grad_norm": torch.stack([s.grad_norm for s in steps]).mean(),
            "learning_rate": steps[-1].learning_rate,
            "tokens_per_s": sum(s.tokens for s in steps) / self._elapsed_s,
            "samples_per_s": sum(s.samples for s in steps) / self._elapsed_s,
            "tflops": tflops,
            "mfu": tflops / self._peak_tflops,
            "data_wait": worst[1],
            "step_s": self._elapsed_s / len(steps),
            "peak_gib": worst[0] / 2**30,
            "tokens": float(state.tokens),
            "samples": float(state.samples),
            "skipped_updates": float(state.skipped_updates),
            "time": time.time(),
        }
        self._clear()
        if self._run.world.rank == 0:
            numbers = self._logger.log(state.step, row)
            self._progress.update(state.step, numbers)
