"""What the states of a run take: those that are trained, and those that are only there."""

import torch

from hunyuan_train.config.root import RunConfig
from hunyuan_train.memory.states import StateBytes, state_bytes
from hunyuan_train.models.registry import build_model
from hunyuan_train.optim.unfreezing import Unfreezing


def footprint(cfg: RunConfig) -> StateBytes:
    """Return the bytes per parameter of the model that a run keeps between updates.

    Raises:
        ValueError: patterns of ``optimizer`` that are no parameters.
    """
    teacher = 0.0
    if cfg.objective.distill:  # in the compute dtype, see engine.teacher
        teacher = {"bfloat16": 2.0, "float32": 4.0, "float64": 8.0}[cfg.parallel.compute_dtype]
    return state_bytes(cfg.memory, trained=trained_share(cfg), teacher=teacher)


def trained_share(cfg: RunConfig) -> float:
    """Return the share of the parameters that are ever trained."""
    if not cfg.optimizer.trainable:
        return 1.0
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in build_model(cfg.model).named_parameters()}
    never = Unfreezing(sizes, cfg.optimizer).never
    return 1 - sum(sizes[name] for name in never) / sum(sizes.values())
