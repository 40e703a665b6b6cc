"""Small training states under any layout, every value of a source drawn by its name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import flatten, read_tensors, stored_tensors
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.config.compose import compose_config, config_dict
from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine.build import init_weights, lay_out
from hunyuan_train.engine.state import TrainState
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import build_updates
from hunyuan_train.parallel.mesh import Axes, build_axes
from hunyuan_train.parallel.view import fill_part
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.runtime.seed import keyed_torch_generator

MODEL = [
    *("model.num_double_blocks=1", "model.num_single_blocks=1", "model.mlp_ratio=2"),
    *("model.num_heads=2", "model.hidden_size=32", "model.rope_axes=[4,6,6]"),
]


class FakeLoader:
    """Takes any place in the data."""

    state: dict[str, Any]

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def config(*fields: str, **model: Any) -> RunConfig:
    """Return the config of a small model; ``model`` changes single fields of its section."""
    cfg = compose_config([*MODEL, "run.device=cpu", "optimizer.warmup_steps=0", *fields])
    cfg.model = replace(cfg.model, **model)
    return cfg


def fresh_state(cfg: RunConfig, world: int = 1) -> TrainState:
    """Return the state of a run that has not begun."""
    axes = Axes.alone() if world == 1 else build_axes(cfg.parallel, "cpu", world)
    model, rules = lay_out(cfg, axes, torch.device("cpu"))
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory)
    init_weights(updates, rules, cfg.run.seed)
    return TrainState(
        model=model,
        updates=updates,
        ema=Ema(model.module, cfg.optimizer, updates.local_weights(), cfg.memory.ema),
        loader=FakeLoader({"place": 0}),  # pyright: ignore[reportArgumentType]
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros(()),
    )


def save(state: TrainState, cfg: RunConfig, run: Path) -> Path:
    """Save a state as ``train`` does and return the folder of the run."""
    manager = CheckpointManager(
        run / "checkpoints", CheckpointConfig(), identity=config_dict(cfg.model)
    )
    assert manager.save(state.step, state.tensors(), state.counters())
    return run


def save_filled(cfg: RunConfig, run: Path, *, step: int = 40) -> Path:
    """Save a state whose every tensor is drawn by its name, in one process."""
    state = fresh_state(cfg)
    for name, part in flatten(state.tensors()).items():
        whole = torch.full((), 3.0)
        if part.ndim:
            whole = torch.randn(part.shape, generator=keyed_torch_generator(1, name)).abs()
        fill_part(part, whole)
    state.step, state.lr = step, 1e-4
    state.loader.load_state_dict({"place": 77})
    return save(state, cfg, run)


def stored(run: Path) -> dict[str, Tensor]:
    """Return every tensor of the only checkpoint of a run."""
    (folder,) = (run / "checkpoints").glob("step-*")
    flat = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored_tensors(folder).items()
    }
    read_tensors(folder, flat, Ranks(alone=True))
    return flat
