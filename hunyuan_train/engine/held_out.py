"""The held-out loss of a run's model on the layout it is trained on."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import Batch, check_sample, empty_batch
from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.data.store import LatentStore, Sample
from hunyuan_train.engine.build import TrainRun, build_on_meta
from hunyuan_train.engine.data import check_store, largest_batch, token_limit
from hunyuan_train.engine.inputs import build_inputs
from hunyuan_train.engine.state import TrainState
from hunyuan_train.evaluation.loss import (
    SEED,
    LossTable,
    ProbeBatch,
    choose_rows,
    probe_batches,
    sigma_at,
)
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import set_recompute
from hunyuan_train.objectives.config import Weighting
from hunyuan_train.objectives.loss import flow_matching_loss
from hunyuan_train.parallel.apply import check_sequence
from hunyuan_train.runtime.dist import broadcast_from_first

log = logging.getLogger(__name__)

Mark = Callable[[str], object]
"""Called before each forward with the bucket it is of."""


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """Give the model its averaged weights inside a ``with`` block, on all ranks."""
    with state.ema.swap():
        state.updates.weights_changed()
        yield
    state.updates.weights_changed()


def measuring_config(cfg: RunConfig) -> RunConfig:
    """Return the config whose inputs an evaluation takes: keyed by the sample, plain loss.

    A model that learns to be guided is measured at scale 1, which is the data's velocity.
    """
    objective = cfg.objective
    scale = 1.0 if objective.distill else objective.train_guidance
    plain = replace(
        objective, text_drop=0.0, weighting=Weighting.none, distill=False, train_guidance=scale
    )
    return replace(cfg, run=replace(cfg.run, seed=SEED), objective=plain)


class HeldOut:
    """Measures the loss of held-out samples; every rank makes the same calls.

    Ranks with distinct data share the batches. Each runs as many forwards as any other, so that
    sharded weights are gathered together.
    """

    def __init__(self, run: TrainRun) -> None:
        """Open the store and deal its samples to the ranks.

        Raises:
            ValueError: the store does not fit the model, the training data or the layout, or has no
                sample of a bucket that is trained on.
        """
        cfg, axes = run.cfg, run.state.model.axes
        self._cfg, self._axes, self._device = measuring_config(cfg), axes, run.world.device
        self._store = store = LatentStore.open(cfg.evaluation.latents, cfg.data, "held-out")
        check_store(cfg, store, cfg.evaluation.latents)
        self._scale = run.scaling_factor
        if store.meta.scaling_factor != self._scale:
            raise ValueError(
                f"evaluation.latents={cfg.evaluation.latents} has "
                f"scaling_factor={store.meta.scaling_factor:g}, the training data "
                f"{self._scale:g}; precompute both with the same VAE"
            )
        rows = choose_rows(cells_of([store], cfg.data), cfg.evaluation.samples_per_bucket)
        check_sequence({str(bucket): bucket.tokens for bucket in rows}, cfg.parallel)
        parameters = sum(p.numel() for p in build_on_meta(cfg).parameters())
        tokens = token_limit(cfg, parameters, run.world, axes)
        largest = {bucket: largest_batch(bucket, tokens, cfg.data) for bucket in rows}
        self._quantiles = cfg.evaluation.quantiles
        batches = probe_batches(rows, len(self._quantiles), largest)
        self._buckets: list[Bucket] = list(rows)
        ranks, rank = axes.size("dp"), axes.rank("dp")
        self._mine = batches[rank::ranks]
        self._fillers = -(-len(batches) // ranks) - len(self._mine)
        self._cheapest = batches[-1]
        samples = sum(len(numbers) for numbers in rows.values())
        log.info(
            "held-out loss: %d samples of %d buckets at %d noise levels, %d forwards a rank",
            *(samples, len(rows), len(self._quantiles), len(self._mine) + self._fillers),
        )

    @torch.no_grad()
    def measure(self, state: TrainState, mark: Mark) -> LossTable:
        """Return the losses of the present weights, to the last bit the same on all ranks."""
        table = LossTable(self._buckets, self._quantiles)
        set_recompute(state.model.module, Recompute.none, offload=False)
        for batch in self._mine:
            mark(str(batch.bucket))
            losses, counts = self._losses(state, batch)
            values = zip(batch.probes, losses.tolist(), counts.tolist(), strict=True)
            for probe, loss, tokens in values:
                table.add(batch.bucket, probe.quantile, loss, tokens)
        for _ in range(self._fillers):
            mark(str(self._cheapest.bucket))
            self._losses(state, self._cheapest)
        sums = self._axes.sum(table.sums.to(self._device), "dp")
        table.sums = broadcast_from_first(sums).cpu()
        return table

    def _losses(self, state: TrainState, probes: ProbeBatch) -> tuple[Tensor, Tensor]:
        """Return loss sums and counted tokens of the samples of a batch, [B] each on the CPU."""
        batch, bad = self._load(probes)
        tokens = probes.bucket.tokens
        levels = [self._quantiles[probe.quantile] for probe in probes.probes]
        sigma = torch.tensor([sigma_at(q, self._cfg.objective, tokens) for q in levels])
        x = build_inputs(batch, self._cfg, self._scale, self._device, sigma)
        predicted = state.updates.module(*x.arguments())
        parts = flow_matching_loss(predicted, x.target, weights=x.weights, given=x.given)
        losses, counts = parts.samples.double().cpu(), x.counted(tokens)
        return torch.where(bad, 0.0, losses), torch.where(bad, 0.0, counts)

    def _load(self, probes: ProbeBatch) -> tuple[Batch, Tensor]:
        """Return a batch, and which of its samples could not be read by a rank that shares it."""
        store, size = self._store, len(probes.probes)
        batch = empty_batch(store, probes.bucket, size, 1.0)
        bad = torch.zeros(size, dtype=torch.bool)
        samples: dict[int, Sample] = {}
        for place, probe in enumerate(probes.probes):
            row = store.index.row(probe.row)
            # The noise of a sample differs from level to level.
            epoch = round(1e6 * self._quantiles[probe.quantile])
            try:
                if probe.row not in samples:
                    sample = store.load(probe.row, 0)
                    check_sample(sample, row, store.meta)
                    samples[probe.row] = sample
                batch.put(place, row, epoch, 0, samples[probe.row])
            except SampleError as error:
                log.warning("held-out loss without a sample: %s", error)
                bad[place] = True
                batch.text[place], batch.text_mask[place] = batch.empty_text, batch.empty_mask
        if self._axes.size("model") > 1:
            shared = self._axes.sum(bad.to(self._device, torch.float32), "model")
            bad = (shared > 0).cpu()
        return batch, bad
