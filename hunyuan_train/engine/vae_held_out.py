"""How well the VAE under training gives back held-out clips, on the layout it is trained on."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.pixels import PixelStore
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.data import largest_batch
from hunyuan_train.engine.held_out import Mark, averaged
from hunyuan_train.engine.meter import StepMeter
from hunyuan_train.engine.reconstruction import Reconstruction, latent_shape, to_network
from hunyuan_train.engine.sampling import PROMPTS_NAME
from hunyuan_train.engine.showing import deal, sample_folder
from hunyuan_train.engine.state import TrainState
from hunyuan_train.evaluation.loss import SEED, choose_rows
from hunyuan_train.evaluation.reconstruction import ReconstructionScores, compare_grid
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import set_recompute
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.observability.trackers import Media
from hunyuan_train.runtime.dist import gather_objects

log = logging.getLogger(__name__)

_SHOWN = 6
"""Clips and images whose reconstructions are shown."""


@dataclass(kw_only=True, slots=True)
class Gauge:
    """Means over held-out samples."""

    mean: float
    """Mean absolute error of pixel values in [-1, 1]; NaN without samples."""
    values: dict[str, float]

    def row(self, prefix: str = "") -> dict[str, float]:
        """Return everything by name, what was not measured left out."""
        values = {"loss": self.mean, **self.values}
        return {f"{prefix}{name}": v for name, v in values.items() if not math.isnan(v)}


class HeldOutClips:
    """Measures PSNR, SSIM and the perceptual distance; every rank makes the same calls."""

    def __init__(self, run: TrainRun) -> None:
        """List the held-out clips and deal them to the ranks.

        Raises:
            ValueError: there is no usable clip of a bucket that is trained on.
        """
        cfg, axes = run.cfg, run.state.model.axes
        self._run, self._axes = run, axes
        data = replace(cfg.data, source=cfg.evaluation.clips, sources={})
        folder = str(run.folder / "held-out")
        self.store = PixelStore(data, folder, SEED)
        rows = choose_rows(cells_of([self.store], data), cfg.evaluation.samples_per_bucket)
        self._batches = list(batches_of(rows, cfg.data.max_tokens, run))
        mine, counts = deal(len(self._batches), axes.rank("dp"), axes.size("dp"))
        self._mine = [(self._batches[number], number in counts) for number in mine]
        total = sum(len(numbers) for numbers in rows.values())
        log.info("held-out clips: %d samples of %d buckets", total, len(rows))

    @torch.no_grad()
    def measure(self, state: TrainState, mark: Mark) -> Gauge:
        """Return the scores of the present weights, the same on all ranks."""
        task = state.task
        assert isinstance(task, Reconstruction)
        scores = ReconstructionScores(task.perceptual)
        error, count = 0.0, 0
        for (bucket, numbers), counts in self._mine:
            mark(str(bucket))
            pixels, good = self._load(bucket, numbers)
            decoded = reconstructed(self._run, pixels).float().cpu()
            if counts and good:
                decoded, pixels = decoded[good], pixels[good].float().cpu()
                device = self._run.world.device  # where the perceptual network is
                scores.add(decoded.to(device), pixels.to(device))
                error += (decoded - pixels).abs().flatten(1).mean(dim=1).double().sum().item()
                count += len(good)
        names = [*scores.sums, "error", "count"]
        sums = torch.tensor([*scores.sums.values(), error, count], dtype=torch.float64)
        total = self._axes.sum(sums.to(self._run.world.device), "dp").tolist()
        merged = dict(zip(names, total, strict=True))
        scores.sums = {name: merged[name] for name in scores.sums}
        found = {}
        for medium, means in scores.scores().items():
            found[f"{medium}/psnr_db"] = means.psnr_db
            found[f"{medium}/ssim"] = means.ssim
            found[f"{medium}/{task.perceptual.name}"] = means.perceptual
            found[f"{medium}/flicker"] = means.flicker
        mean = merged["error"] / merged["count"] if merged["count"] else math.nan
        return Gauge(mean=mean, values=found)

    def _load(self, bucket: Bucket, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return pixels [B, 3, F, H, W] of rows, and the places of those that could be read."""
        black = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
        clips, good = [], []
        for place, number in enumerate(numbers):
            try:
                clips.append(self.store.load(number, 0))
                good.append(place)
            except SampleError as error:
                log.warning("held-out clips without a sample: %s", error)
                clips.append(black)
        return pixels_of(self._run, clips), good


def batches_of(
    rows: dict[Bucket, list[int]], tokens: int, run: TrainRun
) -> Iterator[tuple[Bucket, list[int]]]:
    """Yield rows of one bucket each, as many as a micro-batch of training has."""
    for bucket, numbers in rows.items():
        size = largest_batch(bucket, tokens, run.cfg.data)
        for first in range(0, len(numbers), size):
            yield bucket, numbers[first : first + size]


def pixels_of(run: TrainRun, clips: Sequence[np.ndarray]) -> Tensor:
    """Return clips uint8 [F, H, W, 3] as the network takes them, [B, 3, F, H, W]."""
    dtype = getattr(torch, run.cfg.parallel.compute_dtype)
    return to_network(torch.from_numpy(np.stack(clips)), run.world.device, dtype)


@torch.no_grad()
def reconstructed(run: TrainRun, pixels: Tensor, *, tiles: bool = False) -> Tensor:
    """Return what the VAE under training makes of pixels [B, 3, F, H, W], by the mean latents."""
    state = run.state
    set_recompute(state.model.module, Recompute.none, offload=False)
    vae = state.model.module
    assert isinstance(vae, Vae)
    noise = pixels.new_zeros(len(pixels), *latent_shape(vae.cfg, pixels.shape))
    return state.updates.module(pixels, noise, tiles=tiles)[0]


class Comparisons:
    """Pictures of held-out clips beside their reconstructions; every rank makes the same calls."""

    def __init__(self, run: TrainRun) -> None:
        """Choose what is shown: a few rows, spread over the buckets."""
        self._run = run
        data = replace(run.cfg.data, source=run.cfg.evaluation.clips, sources={})
        self._store = PixelStore(data, str(run.folder / "held-out"), SEED)
        rows = choose_rows(cells_of([self._store], data), 1)
        self._rows = [numbers[0] for numbers in rows.values()][:_SHOWN]

    def shown(self, step: int) -> bool:
        """Return whether the pictures of a step are complete."""
        return (sample_folder(self._run.folder, step) / PROMPTS_NAME).is_file()

    def sample(self, step: int, mark: Callable[[], None], meter: StepMeter) -> Callable[[], None]:
        """Reconstruct; return what is left to do: write and send."""
        state, axes = self._run.state, self._run.state.model.axes
        mine, counts = deal(len(self._rows), axes.rank("dp"), axes.size("dp"))
        found: dict[int, np.ndarray] = {}
        with averaged(state) if state.ema.state_dict() else nullcontext():
            for place in mine:
                mark()
                pixels = pixels_of(self._run, [self._store.load(self._rows[place], 0)])
                decoded = reconstructed(self._run, pixels)
                if place in counts:
                    found[place] = compare_grid(decoded[0].float().cpu(), pixels[0].float().cpu())
        pictures = {place: p for part in gather_objects(found) for place, p in part.items()}
        folder, rank = sample_folder(self._run.folder, step), self._run.world.rank
        names = [
            f"{self._store.index.row(number).source}: recording, reconstruction, 5 x error"
            for number in self._rows
        ]

        def write() -> None:
            if rank:
                return
            folder.mkdir(parents=True, exist_ok=True)
            items = []
            for place, picture in sorted(pictures.items()):
                path = folder / f"{place:03d}-0.png"
                Image.fromarray(picture).save(path)
                items.append(Media(name=f"samples/{path.stem}", path=path, caption=names[place]))
            (folder / PROMPTS_NAME).write_text(json.dumps(names, indent=2))
            meter.media(step, items)

        return write
