"""What the states of a run take: those that are trained, and those that are only there."""

from dataclasses import replace

import torch

from hunyuan_train.config.root import RunConfig
from hunyuan_train.memory.states import StateBytes, state_bytes
from hunyuan_train.models.lora import adapter_parameters
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
    trained = trained_share(cfg)
    if not cfg.lora.rank:
        return state_bytes(cfg.memory, trained=trained, teacher=teacher)
    states = state_bytes(cfg.memory, trained=trained, averaged=trained)
    frozen = 2.0 if cfg.parallel.compute_dtype == "bfloat16" else states.weight
    return replace(states, weight=frozen + trained * states.weight)


def trained_share(cfg: RunConfig) -> float:
    """Return what is ever trained, over the parameters of the model without adapters."""
    if not cfg.optimizer.trainable and not cfg.lora.rank:
        return 1.0
    with torch.device("meta"):
        model = build_model(cfg.model)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    if cfg.lora.rank:
        return adapter_parameters(model, cfg.lora) / sum(sizes.values())
    never = Unfreezing(sizes, cfg.optimizer).never
    return 1 - sum(sizes[name] for name in never) / sum(sizes.values())
