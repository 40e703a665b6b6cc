"""Precompute: clips and captions to a latent store, only what is new or changed, by many processes.

Work is split into units by a hash of the file name. A process claims a unit, does what the
committed parts do not hold yet, and commits one part. When no unit is left, the first process to
come makes the index of the parts; the others find it made.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import check_vae
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.manifest import Source, list_sources
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder
from hunyuan_train.engine.precompute_merge import is_merged, merge
from hunyuan_train.engine.precompute_progress import Progress, Tally, display, write_stages
from hunyuan_train.engine.precompute_units import Pipeline
from hunyuan_train.engine.precompute_work import Worker
from hunyuan_train.models.vae.state_dict import load_vae
from hunyuan_train.runtime.dist import World
from hunyuan_train.runtime.env import read_array_task

logger = logging.getLogger(__name__)

__all__ = ["PrecomputeSummary", "Progress", "precompute", "precompute_from_config", "split_units"]


@dataclass(kw_only=True, slots=True)
class PrecomputeSummary:
    """What a precompute run left in the store, and what this process did for it."""

    folder: str
    sources: int
    ok: int
    """Sources with at least one sample."""
    samples: int
    encoded: int
    """Sources that this process encoded."""
    texts: int
    """Captions that this process encoded."""
    quarantined: dict[str, int]
    """Files left out, by reason."""
    seconds: float
    stages: str
    """Time and throughput of the stages of this process."""

    @property
    def cached(self) -> int:
        """Usable sources that this process found in the store."""
        return self.ok - self.encoded

    def __str__(self) -> str:
        """Return the summary as one line."""
        total = sum(self.quarantined.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.quarantined.items())
        return (
            f"{self.ok} of {self.sources} sources usable ({self.encoded} encoded, {self.cached} "
            f"cached, {self.texts} captions encoded), {self.samples} samples, {total} quarantined"
            f"{f' ({reasons})' if reasons else ''}, {self.seconds:.1f} s, in {self.folder}"
            f"{f'; {self.stages}' if self.stages else ''}"
        )


def precompute_from_config(cfg: RunConfig, world: World) -> PrecomputeSummary:
    """Run :func:`precompute` with the VAE in ``run.vae`` and the text encoder of ``text``.

    The tasks of a Slurm array share the work, each with all its processes.

    Raises:
        ValueError: A setting is missing or the encoders cannot be loaded.
    """
    if not cfg.run.vae:
        raise ValueError(
            "run.vae is empty; set it to the folder of the VAE (config.json, model.safetensors)"
        )
    encoder = build_latent_encoder(cfg.run.vae, world.device)
    text = build_text_encoder(cfg.text, world.device)
    task, tasks = read_array_task()
    with display(cfg.logging, world.rank) as shown:
        return precompute(
            cfg.data,
            encoder,
            text,
            task * world.size + world.rank,
            tasks * world.size,
            shown if world.rank == 0 else None,
        )


def build_latent_encoder(folder: str, device: torch.device) -> LatentEncoder:
    """Load the VAE in ``folder`` onto ``device`` for encoding.

    Raises:
        ValueError: it cannot be loaded, or its latents are not those of buckets.
    """
    vae = load_vae(folder, device)
    check_vae(vae.cfg)
    return LatentEncoder(vae, device, next(vae.parameters()).dtype, vae.cfg.scaling_factor)


def precompute(
    cfg: DataConfig,
    vae: LatentEncoder,
    text: TextEncoder,
    process: int = 0,
    num_processes: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> PrecomputeSummary:
    """Bring the latent store at ``cfg.latents`` up to date with ``cfg.source``.

    Any number of processes, on one machine or on several that share the folder, may run this with
    the same arguments at once, and start and end when they like; each returns when the whole store
    is complete.

    Args:
        cfg: What to read and how to bucket it.
        vae: Pixels to latents.
        text: Captions to features.
        process: Index of this process; it decides where in the list of units it begins.
        num_processes: How many processes share the work.
        progress: Called every few seconds and at the end with what all processes have done.

    Returns:
        Counts over the whole store and of this process's work.

    Raises:
        ValueError: The source has nothing to read, or a setting is missing.
        OSError: The store cannot be written.
    """
    if not cfg.latents:
        raise ValueError("data.latents is empty; set it to a folder for the latent store")
    started, began = time.monotonic(), time.time()
    listing = list_sources(cfg.source, cfg.caption_variants, cfg.field_drop)
    with _worker(cfg, vae, text) as worker:
        worker.store.refresh()
        known, at_rest = worker.store.parts, is_merged(worker.store)
        units = split_units(listing.sources, cfg.shard_sources)
        missing = [unit for unit in units if not worker.is_done(unit[1])]
        tally = Tally(worker, len(listing.sources), sum(len(unit[1]) for unit in missing), progress)
        first = process * len(missing) // num_processes
        Pipeline(worker, tally.moved).run(deque(missing[first:] + missing[:first]))
        tally.finished()
        with worker.store.claims.waiting_for("index"):
            merged = merge(worker, listing, known)
            write_stages(worker, process, began, at_rest)
    summary = PrecomputeSummary(
        folder=cfg.latents,
        sources=len(listing.sources) + len(listing.rejected),
        ok=merged.ok,
        samples=merged.samples,
        encoded=worker.encoded,
        texts=worker.texts,
        quarantined=merged.quarantined,
        seconds=time.monotonic() - started,
        stages=str(worker.stages),
    )
    if process == 0:
        logger.info("precompute: %s", summary)
    return summary


@contextmanager
def _worker(cfg: DataConfig, vae: LatentEncoder, text: TextEncoder) -> Iterator[Worker]:
    worker = Worker(cfg, vae, text)
    try:
        yield worker
    finally:
        worker.store.claims.close()


def split_units(sources: list[Source], per_unit: int) -> list[tuple[str, list[Source]]]:
    """Split sources into named units of about ``per_unit`` by a hash of the file name.

    Every process gets the same units, whatever is done already.
    """
    count = -(-len(sources) // per_unit)
    units: dict[int, list[Source]] = {}
    for source in sources:
        number = int(hashlib.sha256(source.file.encode()).hexdigest()[:12], 16) % count
        units.setdefault(number, []).append(source)
    return [(f"unit-{number:06d}-of-{count}", units[number]) for number in sorted(units)]
