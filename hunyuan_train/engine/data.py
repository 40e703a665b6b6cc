"""From the data section of a config to the loader of a rank."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig, Encode
from hunyuan_train.data.cost import sample_cost
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.data.mixture import Cell, cells_of
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.data.store import LatentStore, SampleStore
from hunyuan_train.engine.footprint import footprint
from hunyuan_train.engine.inputs import check_stills
from hunyuan_train.engine.serving import build_online, open_service
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.estimate import Shards, max_tokens
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.runtime.device import total_memory_bytes
from hunyuan_train.runtime.dist import World

log = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
"""File in the run's folder that lists the samples training could not use."""


def open_data(cfg: RunConfig, world: World) -> dict[str, SampleStore]:
    """Open what a run draws from, by source name: latent stores, or clips to encode."""
    if cfg.data.encode is Encode.ahead:
        return open_stores(cfg)
    store: SampleStore
    if cfg.data.encode is Encode.online:
        store = build_online(cfg, world.device)
    else:
        store = open_service(cfg, world)
    check_store(cfg, store, cfg.data.source)
    return {"": store}


def open_stores(cfg: RunConfig) -> dict[str, SampleStore]:
    """Open the latent stores of a run by source name and check that the model can take them.

    Raises:
        ValueError: naming the field of the config and the store that disagree, or two stores that
            were not made by the same encoders.
    """
    sources = {name: source.latents for name, source in cfg.data.sources.items()}
    if not sources:
        if not cfg.data.latents:
            raise ValueError(
                "data.latents is empty; give it the folder that `hunyuan-train precompute` wrote"
            )
        sources = {"": cfg.data.latents}
    stores: dict[str, SampleStore] = {}
    for name, folder in sources.items():
        store = LatentStore.open(folder, cfg.data, name)
        check_store(cfg, store, folder)
        stores[name] = store
    first, *others = stores.values()
    for store in others:
        for field in ("vae_fingerprint", "text_fingerprint", "scaling_factor", "text_length"):
            ours, theirs = getattr(first.meta, field), getattr(store.meta, field)
            if ours != theirs:
                raise ValueError(
                    f"data.sources.{store.name} has {field}={theirs}, data.sources.{first.name} "
                    f"has {ours}; precompute both with the same encoders"
                )
    return stores


def check_store(cfg: RunConfig, store: SampleStore, folder: str) -> None:
    """Check that the stored sizes are those of the model, and that tasks find their frames.

    Raises:
        ValueError: naming the field, both values and the fix.
    """
    if cfg.text.sees_images != store.meta.text_images:
        made, fix = ("with", "llava") if store.meta.text_images else ("without", "hunyuan")
        raise ValueError(
            f"text.kind={cfg.text.kind}, but the text features in {folder} were made {made} the "
            f"first frames of its videos; run precompute again, or set text.kind={fix}"
        )
    wanted = {
        "latent_channels": ("model.out_channels", cfg.model.out_channels),
        "text_dim": ("model.text_dim", cfg.model.text_dim),
        "pooled_dim": ("model.pooled_dim", cfg.model.pooled_dim),
    }
    for name, (field, value) in wanted.items():
        found = getattr(store.meta, name)
        if found != value:
            raise ValueError(
                f"{field}={value}, but the latents in {folder} have {name}={found}; "
                f"precompute again with this config or set {field}={found}"
            )
    if any(group.bucket.frames > 1 for group in store.index.groups):
        check_stills(cfg, store.meta.condition_frames, folder)


def token_limit(cfg: RunConfig, parameters: int, world: World, axes: Axes) -> int:
    """Return ``data.max_tokens``, or what the device's memory holds if it is 0."""
    if cfg.data.max_tokens:
        return cfg.data.max_tokens
    layout = cfg.parallel
    shards = Shards(
        tp=layout.tp,
        sp=layout.sp,
        cp=layout.cp_ring * layout.cp_ulysses,
        states=axes.size("zero") if layout.zero_stage else 1,
    )
    narrow = 2 if layout.compute_dtype == "bfloat16" else 4
    memory = total_memory_bytes(world.device)
    if world.device.type == "cpu":
        memory //= world.size
    # Where recompute is chosen by bucket, a batch that needs none beats a larger one that does.
    chosen = cfg.memory.recompute
    mode = Recompute.none if chosen is Recompute.auto else chosen
    states = footprint(cfg)
    tokens = max_tokens(
        cfg.model, parameters, memory, narrow, shards, recompute=mode, state_bytes=states
    )
    log.info(
        "data.max_tokens=0: %d tokens a micro-batch by estimate of %.1f GiB", tokens, memory / 2**30
    )
    return tokens


def largest_batch(bucket: Bucket, tokens: int, cfg: DataConfig) -> int:
    """Return the largest micro-batch of a bucket: by hand, or by tokens and ``data.max_batch``."""
    by_hand = cfg.batches.get(str(bucket))
    return by_hand or max(1, min(tokens // bucket.tokens, cfg.max_batch))


def build_planner(
    cfg: RunConfig, stores: dict[str, SampleStore], ranks: int, tokens: int
) -> StepPlanner:
    """Return the planner of the run's draws.

    Args:
        cfg: selection, shares, sizes of an update, model.
        stores: opened stores by source name.
        ranks: ranks with distinct data that a fresh run is planned for.
        tokens: image tokens that fit into one micro-batch.

    Raises:
        ValueError: nothing is selected, or shares ask for what is not there.
    """
    opened = list(stores.values())
    cells = cells_of(opened, cfg.data)

    def text_tokens(cell: Cell) -> float:
        return opened[cell.store].index.group_of(cell.first).tokens_of_text

    return StepPlanner(
        cells,
        [sample_cost(cell.bucket, text_tokens(cell), cfg.model) for cell in cells],
        [largest_batch(cell.bucket, tokens, cfg.data) for cell in cells],
        cfg.data,
        cfg.run.seed,
        cfg.data.planned_ranks or ranks,
        cfg.stage.micro_steps,
    )


def build_loader(
    cfg: RunConfig, stores: dict[str, SampleStore], tokens: int, axes: Axes, world: World
) -> BucketLoader:
    """Return the loader of this rank; ranks of one ``model`` group get the same batches.

    Args:
        cfg: selection, shares, sizes of an update, model.
        stores: opened stores by source name.
        tokens: image tokens that fit into one micro-batch.
        axes: this rank's place.
        world: all ranks.

    Raises:
        ValueError: nothing is selected, or shares ask for what is not there.
    """
    planner = build_planner(cfg, stores, axes.size("dp"), tokens)
    return BucketLoader(
        list(stores.values()),
        planner,
        cfg.data,
        cfg.run.seed,
        axes.rank("dp"),
        axes.size("dp"),
        agree=agreement(axes, world.device),
        quarantine=Path(cfg.run.dir) / QUARANTINE_NAME if axes.is_writer else None,
    )


def agreement(axes: Axes, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return how ranks that share a batch agree on its bad samples, None for a rank alone."""
    if axes.size("model") == 1:
        return None

    def agree(bad: Tensor) -> Tensor:
        return (axes.sum(bad.to(device, torch.float32), "model") > 0).cpu()

    return agree
