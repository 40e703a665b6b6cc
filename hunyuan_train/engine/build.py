"""The composition root: a config and a world in, the parts of a training run out."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.checkpoint.storage import step_of
from hunyuan_train.checkpoint.tensor_digest import boxes, digest_boxes
from hunyuan_train.config.compose import config_dict
from hunyuan_train.config.model_changes import model_identity
from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import Trains
from hunyuan_train.engine.data import build_loader, open_data, token_limit
from hunyuan_train.engine.fitting import fit_kernels, fit_memory
from hunyuan_train.engine.footprint import trained_share
from hunyuan_train.engine.start import start_from
from hunyuan_train.engine.state import TrainState
from hunyuan_train.engine.teacher import build_teacher
from hunyuan_train.engine.vae_build import build_vae_state, draw_weights
from hunyuan_train.models.lora import add_adapters, is_adapter, narrow_frozen
from hunyuan_train.models.registry import build_model, init_rules, sharding_plan
from hunyuan_train.models.spec import InitRule
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import Updates, build_updates, viewed
from hunyuan_train.parallel.apply import ParallelModel, check_sequence, parallelize
from hunyuan_train.parallel.config import ZeroEngine
from hunyuan_train.parallel.init import init_parameters
from hunyuan_train.parallel.mesh import Axes, build_axes
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.resilience.replicas import Replicas
from hunyuan_train.resilience.snapshots import Snapshots
from hunyuan_train.runtime.dist import World, gather_objects
from hunyuan_train.runtime.env import read_launch_env


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """Where the state of a run came from."""

    source: str
    """``memory`` or ``disk``."""
    step: int
    """Updates done in it."""
    seconds: float


@dataclass(kw_only=True)
class TrainRun:
    """The parts of one stage's training run."""

    cfg: RunConfig
    world: World
    folder: Path
    scaling_factor: float
    """Of the latents, which is the same in all stores."""
    state: TrainState
    checkpoints: CheckpointManager
    snapshots: Snapshots
    replicas: Replicas
    restored: Restored | None = None
    """What this attempt went on from; None for a fresh run."""


def build_run(cfg: RunConfig, world: World) -> TrainRun:
    """Build model, optimizer, EMA, loader and checkpoints, and start from what is on disk.

    The newest good checkpoint of the run wins; a fresh run starts from ``stage.init_from`` if set.

    Raises:
        ValueError: if the latents do not fit the config or a checkpoint belongs to another model.
    """
    if cfg.stage.trains is Trains.vae:
        state = build_vae_state(cfg, world)
        return started(cfg, world, state, cfg.vae.scaling_factor)
    stores = open_data(cfg, world)
    axes = build_axes(cfg.parallel, world.device.type, world.size)
    model, rules = lay_out(cfg, axes, world.device)
    parameters = sum(p.numel() for p in build_on_meta(cfg).parameters())
    tokens = token_limit(cfg, parameters, world, model.axes)
    loader = build_loader(cfg, stores, tokens, model.axes, world)
    check_sequence({str(bucket): bucket.tokens for bucket in loader.buckets}, cfg.parallel)
    modes = fit_memory(cfg, world, loader.buckets, tokens)
    fit_kernels(cfg, world, loader.buckets)
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, cfg.run.seed)
    init_weights(updates, rules, cfg.run.seed)
    state = TrainState(
        model=model,
        updates=updates,
        ema=Ema(model.module, cfg.optimizer, averaged_weights(updates, cfg), cfg.memory.ema),
        loader=loader,
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros((), device=world.device),
        modes=modes,
        trained=trained_share(cfg),
        teacher=build_teacher(cfg, axes, world) if cfg.objective.distill else None,
    )
    return started(cfg, world, state, next(iter(stores.values())).meta.scaling_factor)


def started(cfg: RunConfig, world: World, state: TrainState, scaling_factor: float) -> TrainRun:
    """Return the run around a fresh state, which takes what is on disk or what it starts from."""
    axes = state.model.axes
    run = TrainRun(
        cfg=cfg,
        world=world,
        folder=Path(cfg.run.dir),
        scaling_factor=scaling_factor,
        state=state,
        checkpoints=build_checkpoints(cfg),
        snapshots=build_snapshots(cfg, world),
        replicas=Replicas(cfg.resilience, axes, lambda part: digest_boxes(boxes(part))),
    )
    run.restored = restore(run)
    if run.restored is None and cfg.stage.init_from:
        start_from(run.state, cfg)
    return run


def build_checkpoints(cfg: RunConfig) -> CheckpointManager:
    """Return the manager of the checkpoints in ``run.dir``; the model section is their identity."""
    folder = Path(cfg.run.dir) / "checkpoints"
    return CheckpointManager(folder, cfg.checkpoint, identity=model_identity(cfg))


def build_snapshots(cfg: RunConfig, world: World) -> Snapshots:
    """Return the copies of the state in memory; another layout or model cannot use them."""
    states = [cfg.memory.weights, cfg.memory.optimizer_states, cfg.memory.ema]
    layout = [config_dict(cfg.parallel), model_identity(cfg), cfg.stage.name, states]
    return Snapshots(
        cfg.run.dir,
        cfg.resilience,
        rank=world.rank,
        world_size=world.size,
        ranks_per_node=read_launch_env().local_world_size,
        layout=json.dumps(layout, default=str),
    )


def model_and_rules(cfg: RunConfig) -> tuple[nn.Module, dict[str, InitRule]]:
    """Return the single-device model without storage, and the rules of its first values."""
    with torch.device("meta"):
        module = build_model(cfg.model)
    rules = init_rules(module)
    if cfg.lora.rank:
        rules |= add_adapters(module, cfg.lora)
        narrow_frozen(module, getattr(torch, cfg.parallel.compute_dtype))
    return module, rules


def build_on_meta(cfg: RunConfig) -> nn.Module:
    """Return the single-device model without storage."""
    return model_and_rules(cfg)[0]


def averaged_weights(updates: Updates, cfg: RunConfig) -> dict[str, Tensor]:
    """Return the live weights that are averaged: all, or of a model with adapters these alone."""
    weights = updates.local_weights()
    return {n: w for n, w in weights.items() if is_adapter(n)} if cfg.lora.rank else weights


def lay_out(
    cfg: RunConfig, axes: Axes, device: torch.device
) -> tuple[ParallelModel, dict[str, InitRule]]:
    """Return the model of ``cfg`` on ``axes``, not filled, and the rules of its first values.

    DeepSpeed allocates for itself; the model it gets has no storage.
    """
    module, rules = model_and_rules(cfg)
    if cfg.parallel.compute_dtype == "float64":
        module = module.double()
    model = parallelize(module, sharding_plan(cfg.model), axes, cfg.parallel, cfg.memory)
    if cfg.parallel.zero_engine is ZeroEngine.torch:
        model.module.to_empty(device=device)
    return model, rules


def init_weights(updates: Updates, rules: Mapping[str, InitRule], seed: int) -> None:
    """Draw the first weights, of which every rank keeps its part."""
    init_parameters(viewed(updates, updates.local_weights()), rules, seed)
    updates.weights_changed()


def restore(run: TrainRun, *, before: int | None = None) -> Restored | None:
    """Take the newest state in memory or on disk; None if there is none and nothing has changed.

    Args:
        run: The run, its state filled.
        before: Only states of fewer updates in memory; those on disk are all such.
    """
    started, tensors = time.perf_counter(), run.state.tensors()
    latest = gather_objects(run.checkpoints.latest() if run.world.rank == 0 else None)[0]
    saved = step_of(latest) if latest is not None else 0
    kept = run.snapshots.restore(tensors, least=saved, before=before)
    if kept is not None:
        source, counters = "memory", kept.counters
    elif (found := run.checkpoints.restore(tensors, replay=before is None)) is not None:
        source, counters = "disk", found.extra
    else:
        return None
    run.state.load_counters(counters)
    run.state.updates.weights_changed()
    return Restored(source=source, step=run.state.step, seconds=time.perf_counter() - started)


def start_fresh(run: TrainRun) -> None:
    """Put a run that has moved on back to its first step, to the last bit."""
    cfg, state = run.cfg, run.state
    if state.task is None:
        init_weights(state.updates, model_and_rules(cfg)[1], cfg.run.seed)
    else:
        draw_weights(state.updates, cfg)
        state.task.reset()
    for moments in state.updates.local_moments().values():
        for tensor in moments.values():
            tensor.zero_()
    state.ema.reset()
    state.skipped_updates.zero_()
    state.restart_counters()
    if cfg.stage.init_from:
        start_from(state, cfg)
