"""The composition root: a config and a world in, the parts of a training run out."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.config.compose import config_dict
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.index import LatentStore
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.engine.state import TrainState
from hunyuan_train.models.registry import build_model, sharding_plan
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.groups import build_optimizer
from hunyuan_train.parallel.apply import parallelize
from hunyuan_train.parallel.mesh import build_mesh
from hunyuan_train.runtime.dist import World


@dataclass(kw_only=True)
class TrainRun:
    """The parts of one stage's training run."""

    cfg: RunConfig
    world: World
    folder: Path
    store: LatentStore
    state: TrainState
    checkpoints: CheckpointManager


def build_run(cfg: RunConfig, world: World) -> TrainRun:
    """Build model, optimizer, EMA, loader and checkpoints, and start from what is on disk.

    The newest good checkpoint of the run wins; a fresh run starts from ``stage.init_from`` when set.

    Raises:
        ValueError: if the latents do not fit the config or a checkpoint belongs to another model.
    """
    store = open_store(cfg)
    model = build_sharded_model(cfg, world)
    optimizer = build_optimizer(model, cfg.optimizer)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        ema=Ema(model, cfg.optimizer),
        loader=BucketLoader(store, cfg.data, cfg.run.seed, world.rank, world.size),
    )
    folder = Path(cfg.run.dir)
    checkpoints = CheckpointManager(
        folder / "checkpoints", cfg.checkpoint, identity=config_dict(cfg.model)
    )
    run = TrainRun(
        cfg=cfg, world=world, folder=folder, store=store, state=state, checkpoints=checkpoints
    )
    restore(run)
    return run


def open_store(cfg: RunConfig) -> LatentStore:
    """Open the precomputed latents and check that the model can take them.

    Raises:
        ValueError: naming the field of the config and the store that disagree.
    """
    store = LatentStore.open(Path(cfg.data.latents))
    wanted = {
        "latent_channels": ("model.out_channels", cfg.model.out_channels),
        "text_dim": ("model.text_dim", cfg.model.text_dim),
        "pooled_dim": ("model.pooled_dim", cfg.model.pooled_dim),
    }
    for name, (field, value) in wanted.items():
        found = getattr(store.meta, name)
        if found != value:
            raise ValueError(
                f"{field}={value}, but the latents in {cfg.data.latents} have {name}={found}; "
                f"precompute again with this config or set {field}={found}"
            )
    return store


def build_sharded_model(cfg: RunConfig, world: World) -> torch.nn.Module:
    """Build the model, the same weights on every rank from ``run.seed``, and lay it out."""
    torch.manual_seed(cfg.run.seed)
    with torch.device(world.device):
        model = build_model(cfg.model)
    mesh = build_mesh(cfg.parallel, world.device.type, world.size)
    return parallelize(model, sharding_plan(cfg.model), mesh, cfg.parallel)


def restore(run: TrainRun) -> None:
    """Continue from the newest good checkpoint, or start from the weights of another stage."""
    tensors = run.state.tensors()
    restored = run.checkpoints.restore(tensors)
    if restored is not None:
        run.state.load(tensors, restored.extra)
    elif run.cfg.stage.init_from:
        weights = {"model": tensors["model"], "ema": tensors["ema"]}
        run.checkpoints.restore_into(weights, Path(run.cfg.stage.init_from))
        run.state.model.load_state_dict(weights["model"])
        run.state.ema.load_state_dict(weights["ema"])
