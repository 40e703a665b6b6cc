"""The composition root of a stage that trains the VAE: the same parts, around another task."""

from pathlib import Path
from typing import cast

import torch

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.pixels import PixelStore
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.engine.data import QUARANTINE_NAME, agreement, largest_batch
from hunyuan_train.engine.reconstruction import Reconstruction, cut_size, forward_flops, frozen
from hunyuan_train.engine.state import TrainState
from hunyuan_train.memory.config import Recompute, Switch
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.model import CausalVae3D
from hunyuan_train.models.vae.sharding import vae_sharding_plan
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import Updates, build_updates, viewed
from hunyuan_train.parallel.apply import ParallelModel, parallelize
from hunyuan_train.parallel.config import ZeroEngine
from hunyuan_train.parallel.mesh import Axes, build_axes
from hunyuan_train.parallel.vae_split import split_vae
from hunyuan_train.parallel.view import fill_part
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.runtime.dist import World


def build_vae_state(cfg: RunConfig, world: World) -> TrainState:
    """Build VAE, rival, optimizer, average and loader; the weights are drawn.

    Raises:
        ValueError: the layout or what is kept does not suit a VAE, or there is no usable clip.
    """
    check_vae_layout(cfg)
    axes = build_axes(cfg.parallel, world.device.type, world.size)
    model = lay_out_vae(cfg, axes, world.device)
    loader = build_pixel_loader(cfg, axes, world)
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, cfg.run.seed)
    draw_weights(updates, cfg)
    assert isinstance(model.module, Vae)
    return TrainState(
        model=model,
        updates=updates,
        ema=Ema(model.module, cfg.optimizer, updates.local_weights(), cfg.memory.ema),
        loader=loader,
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros((), device=world.device),
        task=Reconstruction(cfg, model.module, axes, world.device),
    )


def check_vae_layout(cfg: RunConfig) -> None:
    """Check what a VAE cannot be combined with.

    Raises:
        ValueError: naming the field, its value and the one that works.
    """
    layout, memory = cfg.parallel, cfg.memory
    modes = {Recompute(memory.recompute), *map(Recompute, memory.recompute_of.values())}
    refused = [
        (layout.tp > 1, f"parallel.tp={layout.tp}", "parallel.tp=1 and shard with zero_stage=3"),
        (layout.zero_engine is not ZeroEngine.torch, "parallel.zero_engine=deepspeed", "torch"),
        (memory.compile, "memory.compile=true", "memory.compile=false"),
        (memory.fused_backward, "memory.fused_backward=true", "memory.fused_backward=false"),
        (memory.offload is Switch.on, "memory.offload=on", "memory.recompute=full"),
        (Recompute.selective in modes, "memory.recompute=selective", "none or full"),
        (bool(cfg.lora.rank), f"lora.rank={cfg.lora.rank}", "lora.rank=0"),
        (
            layout.cp > 1 and cfg.vae_training.tiling_share > 0,
            f"parallel.cp_ring={layout.cp_ring} and vae_training.tiling_share="
            f"{cfg.vae_training.tiling_share}",
            "one of them, since tiles need no second rank",
        ),
        (not cfg.data.max_tokens, "data.max_tokens=0", "the tokens that fit, like 256"),
    ]
    chosen = cfg.evaluation
    if (chosen.every_steps or chosen.sample_every) and not chosen.clips:
        raise ValueError(
            f"evaluation.every_steps={chosen.every_steps} and evaluation.sample_every="
            f"{chosen.sample_every} of a stage that trains the VAE need evaluation.clips; give it "
            "a folder of held-out clips and images, or set both to 0"
        )
    for wrong, what, right in refused:
        if wrong:
            raise ValueError(
                f"stage.trains=vae cannot be combined with {what}: its layers are convolutions "
                f"over whole clips; use {right}"
            )


def lay_out_vae(cfg: RunConfig, axes: Axes, device: torch.device) -> ParallelModel:
    """Return the VAE of ``cfg`` on ``axes``, not filled."""
    with torch.device("meta"):
        module = build_vae(cfg.vae)
    if cfg.parallel.compute_dtype == "float64":
        module = module.double()
    model = parallelize(module, vae_sharding_plan(cfg.vae), axes, cfg.parallel, cfg.memory)
    model.module.to_empty(device=device)
    if axes.size("cp") > 1:
        split = split_vae(cast(CausalVae3D, model.module), axes.group("cp"), cfg.parallel.vae_split)
        cast(Vae, model.module).split = split
    if not cfg.parallel.zero_stage:
        # 10 to 40 % faster convolutions on a CPU; the values are the same.
        cast(Vae, model.module).channels_last()
    return model


def draw_weights(updates: Updates, cfg: RunConfig) -> None:
    """Draw the first weights, the same in every layout: every rank draws all and keeps its part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        whole = build_vae(cfg.vae).state_dict()
    for name, part in viewed(updates, updates.local_weights()).items():
        fill_part(part, whole[name].to(part.dtype))
    updates.weights_changed()


def build_pixel_loader(cfg: RunConfig, axes: Axes, world: World) -> BucketLoader:
    """Return the loader of this rank's clips; their predicted cost is that of the VAE alone.

    Raises:
        ValueError: no file is usable, or nothing is selected.
    """
    folder = cfg.data.latents or cfg.run.dir
    store = PixelStore(cfg.data, folder, cfg.run.seed, cfg.vae_training.max_interval)
    cells = cells_of([store], cfg.data)
    key = frozen(cfg)

    def cost(bucket: Bucket) -> float:
        size = cut_size(bucket.height, bucket.width, cfg.vae_training)
        return 3.0 * forward_flops(key, bucket.frames, *size)

    planner = StepPlanner(
        cells,
        [cost(cell.bucket) for cell in cells],
        [largest_batch(cell.bucket, cfg.data.max_tokens, cfg.data) for cell in cells],
        cfg.data,
        cfg.run.seed,
        cfg.data.planned_ranks or axes.size("dp"),
        cfg.stage.micro_steps,
    )
    return BucketLoader(
        [store],
        planner,
        cfg.data,
        cfg.run.seed,
        axes.rank("dp"),
        axes.size("dp"),
        agree=agreement(axes, world.device),
        quarantine=Path(cfg.run.dir) / QUARANTINE_NAME if axes.is_writer else None,
    )
