"""Adds up the numbers of the steps between two rows of metrics and writes the row."""

from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor

from hunyuan_train.config.compose import config_dict
from hunyuan_train.engine.bucket_meter import FILE_NAME, BucketMeter
from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.loss_meter import FILE_NAME as LOSSES_NAME
from hunyuan_train.engine.loss_meter import LossMeter
from hunyuan_train.engine.step import StepMetrics
from hunyuan_train.observability.flops import peak_tflops
from hunyuan_train.observability.metrics import MetricLogger, Throughput
from hunyuan_train.observability.progress import Progress
from hunyuan_train.observability.trackers import Media
from hunyuan_train.resilience.clock import DATA, STEP, Clock
from hunyuan_train.runtime.device import peak_memory_bytes, synchronize
from hunyuan_train.runtime.dist import max_over_ranks


def mean_terms(steps: Sequence[StepMetrics]) -> dict[str, Tensor]:
    """Return the means of what the task shows, each over the updates that have it."""
    names = dict.fromkeys(name for step in steps for name in step.terms)
    return {
        name: torch.stack([s.terms[name] for s in steps if name in s.terms]).mean()
        for name in names
    }


class StepMeter:
    """Keeps step metrics on the device and writes their means, one transfer per row."""

    def __init__(self, run: TrainRun) -> None:
        """Open the run's trackers; rows after the restored step are dropped from the files."""
        cfg, step = run.cfg, run.state.step
        self._run = run
        self._peak = peak_tflops(run.world.device)
        self._progress = Progress(
            cfg.logging, cfg.stage.steps, run.world.rank, start_step=step, label=cfg.stage.name
        )
        self._open()

    def _open(self) -> None:
        run = self._run
        cfg, step = run.cfg, run.state.step
        self._logger = MetricLogger(
            run.folder, cfg.logging, run.world.rank, start_step=step, run_config=config_dict(cfg)
        )
        self._throughput = Throughput(self._peak, run.world.size)
        path = run.folder / FILE_NAME if run.world.rank == 0 else None
        axes, device = run.state.model.axes, run.world.device
        self._buckets = BucketMeter(run.state.loader.buckets, axes, device, path, step)
        table = run.folder / LOSSES_NAME if run.world.rank == 0 else None
        levels = cfg.evaluation.quantiles
        kinds = run.state.loader.kinds
        self._losses = None
        if run.state.task is None:  # else there are no noise levels
            self._losses = LossMeter(kinds, levels, cfg.objective, axes, device, table, step)
        self._balance: list[float] = []
        self._steps: list[StepMetrics] = []

    def go_back(self) -> None:
        """Drop what was counted and written after the present step, which is an earlier one."""
        self._close()
        self._open()

    def _close(self) -> None:
        self._logger.close()
        self._buckets.close()
        if self._losses is not None:
            self._losses.close()

    def __enter__(self) -> "StepMeter":
        """Start the progress line."""
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the trackers and the progress line."""
        self._progress.__exit__(kind, error, trace)
        self._close()

    def add(self, metrics: StepMetrics, data_wait_s: float) -> None:
        """Count one step and the seconds it waited for its data."""
        self._steps.append(metrics)
        self._balance.append(self._run.state.loader.balance.step)
        self._throughput.add(
            tokens=metrics.tokens,
            flops=metrics.flops,
            computed_flops=metrics.computed_flops,
            data_wait_s=data_wait_s,
        )
        self._progress.advance(self._run.state.step)

    def leave_out(self, seconds: float) -> None:
        """Do not count the last ``seconds``: they were not training."""
        self._throughput.leave_out(seconds)

    def show(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Send values that have a file of their own to the trackers."""
        self._logger.show(step, values)

    def media(self, step: int, items: Sequence[Media]) -> None:
        """Send pictures and videos to the trackers; any thread may call it."""
        self._logger.media(step, items)

    def emit(self, clock: Clock) -> None:
        """Write one row of means since the last one; every rank calls it at the same step.

        What the slowest rank waited for data beyond this one is data wait on ``clock``: the others
        waited for it inside their steps.
        """
        run, steps = self._run, self._steps
        if not steps:
            return
        synchronize(run.world.device)
        clock.lap(STEP)
        for metrics in steps:
            self._buckets.add(metrics.micro_steps, metrics.watch.seconds())
            if self._losses is not None:
                self._losses.add(metrics.micro_steps)
        self._buckets.emit(run.state.step)
        if self._losses is not None:
            self._losses.emit(run.state.step)
        rates = self._throughput.take()
        memory = peak_memory_bytes(run.world.device) / 2**30
        worst = max_over_ranks(torch.tensor([memory, rates["data_wait"]], dtype=torch.float64))
        replaced = torch.tensor(float(run.state.loader.replaced), device=run.world.device)
        beyond = worst[1].item() - rates["data_wait"]
        clock.move(STEP, DATA, beyond * rates["step_s"] * len(steps))
        rates["data_wait"] = worst[1].item()
        row: dict[str, Tensor | float | int | str] = {
            "loss": torch.stack([s.loss for s in steps]).mean(),
            "grad_norm": torch.stack([s.grad_norm for s in steps]).mean(),
            **mean_terms(steps),
            "lr": steps[-1].lr,
            **rates,
            "peak_gib": worst[0].item(),
            "tokens": run.state.tokens,
            "samples": run.state.samples,
            "skipped_updates": run.state.skipped_updates,
            "replaced_samples": run.state.model.axes.sum(replaced, "dp"),
            "excluded_samples": run.state.loader.excluded,
            "balance": sum(self._balance) / len(self._balance),
        }
        counts = run.state.loader.service_counts()
        if counts:
            own = torch.tensor(list(counts.values()), dtype=torch.float64).to(run.world.device)
            row |= dict(zip(counts, run.state.model.axes.sum(own, "dp"), strict=True))
        self._steps, self._balance = [], []
        self._progress.show(run.state.step, self._logger.emit(run.state.step, row))
