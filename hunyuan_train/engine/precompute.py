"""Precompute: clips and captions to a latent store, only what is new or changed, by many processes.

Work is split into units by a hash of the file name. A process takes a unit by locking it, redoes
what the committed parts do not hold yet, and commits one part. When no unit is left, each process
merges the parts into the index (the result is the same, so it does not matter who is last).
"""

import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import check_vae
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.manifest import Source, list_sources
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder
from hunyuan_train.engine.precompute_merge import merge
from hunyuan_train.engine.precompute_work import Worker
from hunyuan_train.models.vae.state_dict import load_vae
from hunyuan_train.runtime.dist import World

logger = logging.getLogger(__name__)

_REPORT_S = 5.0
_RETRY_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far one process is; sources of other processes count once they are found done."""

    done: int
    total: int
    encoded: int
    rejected: int
    seconds: float


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
        )


def precompute_from_config(cfg: RunConfig, world: World) -> PrecomputeSummary:
    """Run :func:`precompute` with the VAE in ``run.vae`` and the text encoder of ``text``.

    Raises:
        ValueError: A setting is missing or the encoders cannot be loaded.
    """
    if not cfg.run.vae:
        raise ValueError(
            "run.vae is empty; set it to the folder of the VAE (config.json, model.safetensors)"
        )
    encoder = build_latent_encoder(cfg.run.vae, world.device)
    text = build_text_encoder(cfg.text, world.device)
    return precompute(cfg.data, encoder, text, world.rank, world.size)


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

    Several processes, on one machine or on a shared folder with working file locks, may run this
    with the same arguments at once; each returns when the whole store is complete.

    Args:
        cfg: What to read and how to bucket it.
        vae: Pixels to latents.
        text: Captions to features.
        process: Index of this process; it decides where in the list of units it begins.
        num_processes: How many processes share the work.
        progress: Called after every unit; by default process 0 logs a line every few seconds.

    Returns:
        Counts over the whole store and of this process's work.

    Raises:
        ValueError: The source has nothing to read, or a setting is missing.
        OSError: The store cannot be written.
    """
    if not cfg.latents:
        raise ValueError("data.latents is empty; set it to a folder for the latent store")
    started = time.monotonic()
    listing = list_sources(cfg.source, cfg.caption_variants, cfg.field_drop)
    worker = Worker(cfg, vae, text)
    report = progress or (_Reporter() if process == 0 else None)

    def unit_done(done: int) -> None:
        if report:
            report(
                Progress(
                    done=done,
                    total=len(listing.sources),
                    encoded=worker.encoded,
                    rejected=worker.rejected,
                    seconds=time.monotonic() - started,
                )
            )

    units = split_units(listing.sources, cfg.shard_sources)
    first = process * len(units) // num_processes
    _do_units(worker, deque(units[first:] + units[:first]), unit_done)
    with worker.store.lock("index", wait=True):
        rows, quarantine = merge(worker, listing)
    summary = PrecomputeSummary(
        folder=cfg.latents,
        sources=len(listing.sources) + len(listing.rejected),
        ok=len({row.source for row in rows}),
        samples=len(rows),
        encoded=worker.encoded,
        texts=worker.texts,
        quarantined=dict(sorted(Counter(str(row.reason) for row in quarantine).items())),
        seconds=time.monotonic() - started,
    )
    if process == 0:
        logger.info("precompute: %s", summary)
    return summary


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


def _do_units(
    worker: Worker,
    waiting: deque[tuple[str, list[Source]]],
    unit_done: Callable[[int], None],
) -> None:
    done = refused = 0
    while waiting:
        name, sources = waiting.popleft()
        with worker.store.lock(name, wait=False) as mine:
            if mine:
                worker.do_unit(sources)
        if mine:
            refused = 0
            done += len(sources)
            unit_done(done)
            continue
        # Another process works on it. Come back: it is finished then, or its process was killed.
        waiting.append((name, sources))
        refused += 1
        if refused >= len(waiting):
            refused = 0
            time.sleep(_RETRY_S)


@dataclass(slots=True)
class _Reporter:
    """Logs progress every few seconds and at the end."""

    last: float = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.seconds - self.last >= _REPORT_S or progress.done == progress.total:
            self.last = progress.seconds
            logger.info(
                "precompute: %d of %d sources, %d encoded, %d rejected, %.0f s",
                progress.done,
                progress.total,
                progress.encoded,
                progress.rejected,
                progress.seconds,
            )
